"""The test files that several mutants name."""

from __future__ import annotations

STORE = "tests/contracts/store/test_store.py"
RACES = "tests/scenarios/test_races.py"
HISTORIES = "tests/scenarios/test_histories.py"
ADAPTERS = "tests/contracts/store/test_adapters.py"
NUMBERS = "tests/contracts/test_numbers.py"
