"""Guards of the migrations."""

from __future__ import annotations

from tests.tools.mutants.guards import suites
from tests.tools.mutants.mutant import Edit, Mutant

MIGRATIONS: tuple[Mutant, ...] = (
    Mutant(
        "one job for an idempotency key",
        (
            Edit(
                "migrations/versions/0002_crashes_and_idempotency.py",
                '["idempotency_key"], unique=True)',
                '["idempotency_key"], unique=False)',
            ),
        ),
        (f"{suites.RACES}::TestOpening",),
    ),
    Mutant(
        "an embedded store at work is not upgraded",
        (Edit("migrations/revisions.py", "        _refuse_at_work(settings, store)\n", ""),),
        ("tests/scenarios/test_upgrade_at_work.py",),
    ),
)
