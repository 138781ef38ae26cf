"""The statements that workers make again and again read no large table whole, however many jobs a store has kept."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import Engine, event

from batchmill.jobs.broker.client import Broker
from batchmill.jobs.configuration.settings import load_settings
from batchmill.jobs.requests.states import RunOutcome
from batchmill.jobs.store.store import Store
from batchmill.worker.process.maintenance.leftovers import Leftovers
from batchmill.worker.process.maintenance.reconciler import Reconciler
from tests.support.store import mill

LARGE = ("batches", "requests", "outputs", "runs")
#: Partial indexes, of rows of which there are few at any time.
SMALL = ("ix_batches_worker", "ix_batches_suspects", "ix_runs_crashed")
SETTINGS = load_settings(broker_url="redis://127.0.0.1:1")


@pytest.fixture
def sqlite_store(sqlite_url: str) -> Iterator[Store]:
    store = Store(sqlite_url)
    yield store
    store.close()


@contextmanager
def plans() -> Iterator[dict[str, list[str]]]:
    """Each statement of the block, and how SQLite goes about it."""
    found: dict[str, list[str]] = {}

    def explain(connection: Any, _cursor: Any, statement: str, values: Any, _context: Any, many: bool) -> None:
        if statement.startswith(("SELECT", "UPDATE", "DELETE", "WITH")) and statement not in found:
            driver: sqlite3.Connection = connection.connection.driver_connection
            rows = driver.execute(f"EXPLAIN QUERY PLAN {statement}", values[0] if many else values).fetchall()
            found[statement] = [row[3] for row in rows]

    event.listen(Engine, "before_cursor_execute", explain)
    try:
        yield found
    finally:
        event.remove(Engine, "before_cursor_execute", explain)


def whole_reads(found: dict[str, list[str]]) -> list[str]:
    """Steps of these plans that read a large table from its beginning to its end."""
    steps = [step for plan in found.values() for step in plan if step.startswith("SCAN ")]
    large = [step for step in steps if step.split()[1] in LARGE]
    return [step for step in large if not step.endswith(SMALL)]


def test_whole_reads_are_found(sqlite_store: Store) -> None:
    with plans() as found, sqlite_store.database.read() as connection:
        connection.exec_driver_sql("SELECT count(*) FROM runs WHERE outcome = 'done'")
        connection.exec_driver_sql("SELECT worker_id FROM batches")
        connection.exec_driver_sql("SELECT id FROM batches WHERE id = 1")
    assert len(found) == 3
    assert whole_reads(found) == ["SCAN runs", "SCAN batches"]


@pytest.fixture
def at_work(sqlite_store: Store) -> tuple[Store, int]:
    """A store with a job that is half done, and the worker that is at it."""
    mill.load(sqlite_store, 40)
    session = mill.session(sqlite_store)
    mill.claim(sqlite_store, session, wanted=12)
    return sqlite_store, session.worker_id


def test_a_keepers_look(at_work: tuple[Store, int]) -> None:
    store, worker_id = at_work
    leftovers, reconciler = Leftovers(store, SETTINGS), Reconciler.of(SETTINGS, store, Broker.of(SETTINGS))
    with plans() as found:
        store.registration.heartbeat(worker_id, beat=10.0)
        leftovers.settle_orphans()
        leftovers.discard_abandoned()
        reconciler.repair()
        store.recovery.pending_of(mill.ECHO_SPEC, most=1, worker_id=worker_id)
    assert len(found) > 8
    assert whole_reads(found) == []


def test_crashes_until_the_device_is_to_blame(sqlite_store: Store) -> None:
    mill.load(sqlite_store, 40)
    good, broken = mill.session(sqlite_store, name="good"), mill.session(sqlite_store, name="broken")
    with plans() as found:
        for generation in range(1, 4):
            assert not sqlite_store.health.is_sick(broken.worker_id)
            mill.claim(sqlite_store, replace(broken, generation=generation))
            assert Leftovers(sqlite_store, SETTINGS).settle(broken.worker_id, generation, outcome=RunOutcome.CRASHED)
            sqlite_store.registration.new_generation(broken.worker_id, child_pid=3)
            (claimed,) = mill.claim(sqlite_store, good)
            mill.save(sqlite_store, good, [mill.answered(claimed)])
        assert sqlite_store.health.is_sick(broken.worker_id)
    assert len(found) > 12
    assert whole_reads(found) == []
    # A plan for any value cannot use an index of these runs alone; PostgreSQL makes one after five executions.
    assert any("runs.outcome = 'crashed'" in statement for statement in found)


def test_the_turns_of_a_job(sqlite_store: Store) -> None:
    mill.load(sqlite_store, 40)
    with plans() as found:
        mill.work_off(sqlite_store, mill.session(sqlite_store))
    assert len(found) > 8
    assert whole_reads(found) == []
