"""The store that the tests of diagnosis share."""

from __future__ import annotations

import pytest

from batchmill.jobs.store.store import Store
from tests.support.diagnosis import Place
from tests.support.store import mill


@pytest.fixture
def place(clocked: Store, clock: mill.Clock) -> Place:
    return Place(clocked, clock)
