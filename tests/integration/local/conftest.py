"""Fixtures of `run` and `up`: a home that is empty, and in which nothing runs in the end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.conftest import until
from tests.support.processes.home import Home


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    home = Home(tmp_path / "home")
    yield home
    home.end()
    until(lambda: not home.processes(), "everything that was started has ended")
