"""The store stopped, locked, cut off in the middle of a save: outputs wait, and nothing is lost or done again."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url

from batchmill.jobs.configuration.settings import load_settings
from tests.faults.conftest import SLOW, FaultMill, Pace, PostgresqlServer, both_paces
from tests.integration.conftest import PATIENCE_SECONDS, child_of, until
from tests.support.servers.proxy import FaultProxy
from tests.support.store.oracle import accepted, changed


@pytest.fixture
def postgresql_mill(home: Path, pace: Pace, breakable_url: str) -> Iterator[FaultMill]:
    """A mill on a PostgreSQL that may be stopped."""
    mill = FaultMill(home, load_settings(home=home, database_url=breakable_url, **pace.timers))
    mill.redis.start()
    yield mill
    mill.end()


@both_paces
def test_postgresql_stopped_in_mid_save_costs_nothing(
    postgresql_mill: FaultMill, postgresql_to_break: PostgresqlServer, pace: Pace
) -> None:
    mill = postgresql_mill
    worker = mill.ready_worker(**SLOW)
    child = child_of(worker)
    job_id = mill.submit(pace.requests)
    until(lambda: mill.succeeded(job_id) > 50, "some answers")
    before = accepted(mill.store)
    postgresql_to_break.stop_immediately()
    time.sleep(pace.store_away_seconds)
    assert list(mill.home.glob("spool/*")), "answers wait in the spool"
    postgresql_to_break.start()
    mill.wait(job_id, seconds=pace.patience_seconds)
    mill.check_ended(job_id, pace.requests)
    assert changed(before, mill.store) == []
    assert worker.poll() is None
    assert child_of(worker) == child
    assert mill.repeated() == 0
    assert "Traceback" not in mill.log_of(worker)


def test_postgresql_stopped_while_a_worker_is_idle_and_while_one_starts(
    postgresql_mill: FaultMill, postgresql_to_break: PostgresqlServer
) -> None:
    mill = postgresql_mill
    idle = mill.ready_worker("--name", "idle")
    starting = mill.start("worker", "-m", "echo", "--name", "starting")
    until(lambda: len(mill.store.workers.rows()) == 2, "the other has registered")
    postgresql_to_break.stop_immediately()
    time.sleep(2.5)
    postgresql_to_break.start()
    until(lambda: len(mill.ready()) == 2, "both are ready")
    job_id = mill.submit(100)
    mill.wait(job_id)
    mill.check_ended(job_id, 100)
    assert idle.poll() is None
    assert starting.poll() is None


def test_every_connection_ended_by_postgresql_again_and_again(
    postgresql_mill: FaultMill, postgresql_to_break: PostgresqlServer
) -> None:
    mill = postgresql_mill
    worker = mill.ready_worker(**SLOW)
    child = child_of(worker)
    job_id = mill.submit(300)
    admin = create_engine(make_url(postgresql_to_break.url), isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        for _ in range(12):
            connection.execute(
                text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'outage'")
            ).all()
            time.sleep(0.25)
    admin.dispose()
    mill.wait(job_id)
    mill.check_ended(job_id, 300)
    assert worker.poll() is None
    assert child_of(worker) == child
    assert mill.repeated() == 0


@pytest.mark.parametrize("fault", ["blackhole", pytest.param("refuse", marks=pytest.mark.slow)])
def test_a_network_that_fails_between_worker_and_postgresql(
    fault: str, postgresql_mill: FaultMill, postgresql_to_break: PostgresqlServer, pace: Pace
) -> None:
    mill = postgresql_mill
    direct = make_url(mill.settings.database)
    with FaultProxy(postgresql_to_break.socket) as proxy:
        proxied = direct.set(host="127.0.0.1", port=proxy.port, query={}).render_as_string(hide_password=False)
        worker = mill.ready_worker(database_url=proxied, **SLOW)
        child = child_of(worker)
        job_id = mill.submit(300)
        until(lambda: mill.succeeded(job_id) > 50, "some answers")
        getattr(proxy, fault)()
        time.sleep(pace.store_away_seconds)
        proxy.heal()
        mill.wait(job_id)
        mill.check_ended(job_id, 300)
        assert worker.poll() is None
        assert child_of(worker) == child
        assert mill.repeated() == 0


@both_paces
def test_sqlite_locked_by_someone_else_is_waited_for(mill: FaultMill, pace: Pace) -> None:
    worker = mill.ready_worker(**SLOW)
    child = child_of(worker)
    job_id = mill.submit(pace.requests)
    until(lambda: mill.succeeded(job_id) > 50, "some answers")
    before = accepted(mill.store)
    other = sqlite3.connect(mill.home / "batchmill.db", isolation_level=None, timeout=10)
    other.execute("BEGIN EXCLUSIVE")
    time.sleep(pace.locked_seconds)
    other.execute("ROLLBACK")
    other.close()
    mill.wait(job_id, seconds=pace.patience_seconds)
    mill.check_ended(job_id, pace.requests)
    assert changed(before, mill.store) == []
    assert worker.poll() is None
    assert child_of(worker) == child
    assert mill.repeated() == 0
    log = mill.log_of(worker)
    assert "Traceback" not in log
    assert "[error" not in log


def test_a_worker_that_starts_beside_a_locked_sqlite_waits_for_it_and_hears_its_end(mill: FaultMill) -> None:
    other = sqlite3.connect(mill.home / "batchmill.db", isolation_level=None, timeout=10)
    other.execute("BEGIN EXCLUSIVE")
    starting, ended = (mill.start("worker", "-m", "echo", "--name", name, busy_seconds=0.5) for name in ("a", "b"))
    until(lambda: all("locked" in mill.log_of(each) for each in (starting, ended)), "both wait")
    ended.terminate()
    assert ended.wait(PATIENCE_SECONDS) == 0
    other.execute("ROLLBACK")
    other.close()
    until(lambda: len(mill.ready()) == 1, "the other is ready", seconds=60)
    assert starting.poll() is None
    assert "Traceback" not in mill.log_of(starting) + mill.log_of(ended)


def test_sqlite_locked_for_longer_than_anybody_waits_is_outlived(mill: FaultMill) -> None:
    """Beyond the busy timeout a lock is an outage: answers wait in the spool, commands end with one line."""
    worker = mill.ready_worker(busy_seconds=0.5, **SLOW)
    child = child_of(worker)
    job_id = mill.submit(300)
    until(lambda: mill.succeeded(job_id) > 50, "some answers")
    other = sqlite3.connect(mill.home / "batchmill.db", isolation_level=None, timeout=10)
    other.execute("BEGIN EXCLUSIVE")
    until(lambda: list(mill.home.glob("spool/*")), "answers wait in the spool")
    done = mill.finished("status", job_id, busy_seconds=0.5)
    other.execute("ROLLBACK")
    other.close()
    assert done.returncode == 1
    assert f"locked by pid {os.getpid()}" in done.stderr
    assert done.stderr.count("\n") == 1
    mill.wait(job_id)
    mill.check_ended(job_id, 300)
    assert worker.poll() is None
    assert child_of(worker) == child
    assert mill.repeated() == 0
