"""PostgreSQL as its administrators set it up: other defaults, a schema of one's own, a pooler between."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from time import sleep

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url

from batchmill.jobs.requests.states import JobState
from batchmill.jobs.store.database.postgresql import postgresql_engine
from batchmill.jobs.store.store import Store
from batchmill.migrations import revisions
from tests.support.store import mill

_PGBOUNCER = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")
_HOSTILE = {
    "default_transaction_isolation": "serializable",
    "lock_timeout": "1ms",
    "statement_timeout": "2s",
    "idle_in_transaction_session_timeout": "1s",
}


def _administer(url: str, *statements: str) -> None:
    admin = create_engine(make_url(url), isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        for statement in statements:
            connection.execute(text(statement))
    admin.dispose()


def _works(url: str) -> None:
    """A whole job, answered by two workers in turn."""
    store = Store(url)
    store.check_revision()
    job_id = mill.load(store, 50)
    for name in ("one", "two"):
        mill.work_off(store, mill.session(store, name=name))
    assert store.jobs.job(job_id).state is JobState.COMPLETED
    assert store.jobs.job(job_id).counts.succeeded == 50
    store.close()


def test_a_servers_defaults_do_not_count(postgresql_url: str) -> None:
    name = make_url(postgresql_url).database
    _administer(postgresql_url, *(f"ALTER DATABASE {name} SET {each} = '{_HOSTILE[each]}'" for each in _HOSTILE))
    store = Store(postgresql_url)
    for transaction in (store.database.read, store.database.write):
        with transaction() as connection:
            said = [
                connection.exec_driver_sql(f"SHOW {each}").scalar() for each in ("transaction_isolation", *_HOSTILE)
            ]
        assert said == ["read committed", "serializable", "30s", "2min", "1min"]
    store.close()
    _works(postgresql_url)


def test_the_limits_of_a_transaction_end_with_it(postgresql_url: str) -> None:
    """A pooler lends the session to somebody else by then."""
    limits = ("lock_timeout", "statement_timeout", "idle_in_transaction_session_timeout")
    name = make_url(postgresql_url).database
    _administer(postgresql_url, *(f"ALTER DATABASE {name} SET {each} = '11min'" for each in limits))
    engine = postgresql_engine(make_url(postgresql_url), busy_seconds=10)
    with engine.connect() as connection:
        session = connection.connection.driver_connection
        assert session is not None
        for end in ("commit", "rollback"):
            with connection.begin() as transaction:
                said = [connection.exec_driver_sql(f"SHOW {each}").scalar() for each in limits]
                getattr(transaction, end)()
            assert said == ["30s", "2min", "1min"]
            assert [session.execute(f"SHOW {each}").fetchone() for each in limits] == [("11min",)] * 3
    engine.dispose()


@pytest.mark.parametrize("by_url", [True, False])
def test_the_tables_are_made_and_found_in_the_schema_that_was_asked_for(
    postgresql_url: str, monkeypatch: pytest.MonkeyPatch, by_url: bool
) -> None:
    _administer(postgresql_url, "DROP SCHEMA public CASCADE", "CREATE SCHEMA public", "CREATE SCHEMA mill")
    url = make_url(postgresql_url)
    if by_url:
        url = url.update_query_dict({"options": "-c search_path=mill"})
    else:
        monkeypatch.setenv("PGOPTIONS", "-c search_path=mill")
    revisions.upgrade(url.render_as_string(hide_password=False))
    _works(url.render_as_string(hide_password=False))
    monkeypatch.delenv("PGOPTIONS", raising=False)
    admin = create_engine(make_url(postgresql_url))
    with admin.connect() as connection:
        found = connection.execute(text("SELECT DISTINCT schemaname FROM pg_tables WHERE tablename = 'jobs'")).all()
    admin.dispose()
    assert found == [("mill",)]


@pytest.fixture
def pooled_url(postgresql_url: str, tmp_path: Path) -> Iterator[str]:
    """The store behind a pgbouncer that lends its two sessions for one transaction at a time."""
    if _PGBOUNCER is None:
        pytest.skip("pgbouncer is not installed")
    url = make_url(postgresql_url)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = str(url.query["host"])
    (tmp_path / "users").write_text(f'"{url.username}" ""\n')
    (tmp_path / "pgbouncer.ini").write_text(
        f"[databases]\n{url.database} = host={folder} user={url.username}\n"
        f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\nauth_type = any\n"
        f"pool_mode = transaction\ndefault_pool_size = 2\nauth_file = {tmp_path / 'users'}\n"
    )
    line = [_PGBOUNCER, str(tmp_path / "pgbouncer.ini")]
    if os.geteuid() == 0:  # it does not run as root, and what pytest makes is root's alone
        line += ["-u", Path(folder).owner()]
        for part in (tmp_path, *tmp_path.parents[:2]):
            part.chmod(0o755)
    log = tmp_path / "log"
    with log.open("w") as file, subprocess.Popen(line, stdout=file, stderr=file) as pooler:
        try:
            while not _answers(port):
                assert pooler.poll() is None, log.read_text()
                sleep(0.05)
            yield url.set(host="127.0.0.1", port=port, query={}).render_as_string(hide_password=False)
        finally:
            pooler.terminate()


def _answers(port: int) -> bool:
    with socket.socket() as trial:
        return trial.connect_ex(("127.0.0.1", port)) == 0


def test_statements_are_prepared_in_sessions_of_ones_own_alone(postgresql_url: str, pooled_url: str) -> None:
    prepared = {}
    for url in (postgresql_url, pooled_url):
        store = Store(url)
        for _ in range(10):
            store.workers.rows()
        with store.database.read() as connection:
            prepared[url] = connection.exec_driver_sql("SELECT count(*) FROM pg_prepared_statements").scalar()
        store.close()
    assert prepared == {postgresql_url: 1, pooled_url: 0}


def test_a_pooler_that_lends_sessions_for_one_transaction_is_taken(pooled_url: str) -> None:
    revisions.upgrade(pooled_url)
    for _ in range(3):  # often enough for a driver to prepare what it repeats
        _works(pooled_url)
    one, other = Store(pooled_url), Store(pooled_url)
    with one.database.read() as held, other.database.read() as beside:
        for connection in (held, beside):
            assert connection.exec_driver_sql("SHOW lock_timeout").scalar() == "30s"
    one.close()
    other.close()
