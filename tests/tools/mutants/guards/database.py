"""Guards of the store's database: connections, transactions, locks and the clock."""

from __future__ import annotations

from tests.tools.mutants.guards import suites
from tests.tools.mutants.mutant import Edit, Mutant

DATABASE: tuple[Mutant, ...] = (
    Mutant(
        "a transaction whose commit failed ends",
        (
            Edit(
                "jobs/store/database/database.py",
                "engine = create_engine(self.url, hide_parameters=True,",
                "engine = create_engine(self.url, pool_reset_on_return=None, hide_parameters=True,",
            ),
        ),
        ("tests/unit/jobs/store/database/test_database_ends.py",),
    ),
    Mutant(
        "an interrupt waits for the end of a transaction",
        (
            Edit(
                "jobs/store/database/database.py",
                "with interrupts_later(), self.translated(), self._told() as wait",
                "with self.translated(), self._told() as wait",
            ),
        ),
        ("tests/unit/jobs/runtime/process/test_interrupts.py",),
    ),
    Mutant(
        "whoever opens a SQLite store makes no file",
        (Edit("jobs/store/database/database.py", "else 'rw'}\"", "else 'rwc'}\""),),
        ("tests/unit/jobs/store/database/test_database.py",),
    ),
    Mutant(
        "a look at a SQLite store cannot write",
        (Edit("jobs/store/database/database.py", "{'ro' if self._read_only else 'rw'}", "rw"),),
        ("tests/contracts/store/test_checking.py::test_a_read_only_store_writes_nothing",),
    ),
    Mutant(
        "a look at a PostgreSQL store cannot write",
        (Edit("jobs/store/database/postgresql.py", "{_READ_ONLY if read_only else ''}", ""),),
        ("tests/contracts/store/test_checking.py::test_a_read_only_store_writes_nothing",),
    ),
    Mutant(
        "the victim of a deadlock begins again",
        (
            Edit(
                "jobs/store/database/conflicts.py",
                "            except StoreConflict:\n",
                "            except ZeroDivisionError:\n",
            ),
        ),
        ("tests/contracts/store/test_conflicts.py",),
    ),
    Mutant(
        "who waits keeps no connection to PostgreSQL",
        (Edit("jobs/store/database/postgresql.py", "_KEPT_SECONDS = 0.25\n", "_KEPT_SECONDS = 3_600.0\n"),),
        ("tests/faults/test_connections.py::test_a_store_that_is_not_used_keeps_no_connection",),
    ),
    Mutant(
        "PostgreSQL is asked for READ COMMITTED by name",
        (Edit("jobs/store/database/postgresql.py", "BEGIN ISOLATION LEVEL READ COMMITTED;", "BEGIN;"),),
        ("tests/contracts/store/test_postgresql.py",),
    ),
    Mutant(
        "a writer of SQLite waits for those who came before",
        (Edit("jobs/store/database/database.py", "            with line.head():\n", "            if True:\n"),),
        ("tests/unit/jobs/store/database/test_line.py",),
    ),
    Mutant(
        "BEGIN IMMEDIATE",
        (Edit("jobs/store/database/database.py", 'exec_driver_sql("BEGIN IMMEDIATE")', 'exec_driver_sql("BEGIN")'),),
        (suites.RACES,),
    ),
    Mutant(
        "a lease further ahead than any can be is over",
        (
            Edit(
                "jobs/store/database/clock.py",
                "return or_(until < now - for_seconds, until > now + lease_seconds)",
                "return until < now - for_seconds",
            ),
        ),
        ("tests/contracts/store/test_store.py::TestRecovery::test_a_lease_further_ahead_than_any_can_be_is_over",),
    ),
    Mutant(
        "an adapter's name means one thing to all live workers",
        (Edit("jobs/store/database/database.py", "if not self.is_sqlite:", "if False:"),),
        (suites.ADAPTERS,),
    ),
)
