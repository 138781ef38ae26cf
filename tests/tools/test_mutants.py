"""The mutants of tests/tools/mutants fit the code: each text that they replace stands in its file exactly once."""

from __future__ import annotations

import pytest

from tests.support.paths import ROOT
from tests.tools.mutants.guards import MUTANTS
from tests.tools.mutants.mutant import Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.guard)
def test_its_texts_and_its_tests_are_there(mutant: Mutant) -> None:
    for edit in mutant.edits:
        assert (ROOT / edit.file).read_text().count(edit.old) == 1, edit.file
    for test in mutant.tests:
        assert (ROOT / test.partition("::")[0]).exists()
