"""Guards of the `batchmill` command's first lines."""

from __future__ import annotations

from tests.tools.mutants.mutant import Edit, Mutant

SRC: tuple[Mutant, ...] = (
    Mutant(
        "the current folder leaves the import path",
        (Edit("src/batchmill/__main__.py", "not in relative - kept]", "not in kept - kept]"),),
        ("tests/unit/jobs/runtime/process/test_isolation.py",),
    ),
)
