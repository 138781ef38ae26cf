"""Guards of the producer."""

from __future__ import annotations

from tests.tools.mutants.mutant import Edit, Mutant

PRODUCER: tuple[Mutant, ...] = (
    Mutant(
        "a run compares the model before it exports a finished job",
        (Edit("producer/cli/local/earlier.py", "elif self.model.identity != identity:", "elif False:"),),
        ("tests/unit/producer/cli/local/test_earlier.py",),
    ),
)
