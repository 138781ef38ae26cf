"""Tokenizers with their grammars, built once for a file of tests."""

from __future__ import annotations

import pytest

from tests.support.models.grammar_desk import TOKENIZERS, Desk


@pytest.fixture(scope="module")
def desks() -> dict[str, Desk]:
    return {name: Desk(build()) for name, build in TOKENIZERS.items()}


@pytest.fixture(scope="module")
def desk(desks: dict[str, Desk]) -> Desk:
    return desks["bytes"]
