"""The world of a soak: a home, a store of its own, a Redis behind a proxy, a log of events, and the real command.

Everything is started from the main thread, and ended by `end`, whatever state it is in.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Any

from redis import Redis

from batchmill.jobs.broker.queue_name import queue_name
from batchmill.jobs.configuration.settings import Settings, environment_of, load_settings
from batchmill.jobs.models.spec import ModelSpec
from batchmill.jobs.store.store import Store
from batchmill.migrations.revisions import upgrade
from tests.faults.conftest import PostgresqlServer, RedisServer
from tests.support.paths import ROOT
from tests.support.servers.proxy import FaultProxy
from tests.tools.soak.worker import COUNTS_VARIABLE

ROWS, STEP_SECONDS = 64, 0.5
#: A look at the store that must not hold up the soak gives up after so long.
_GLANCE_SECONDS = 0.3
_COMMAND_SECONDS = 240


class World:
    """One mill on one kind of database, with default timers. `folder` keeps its logs and files."""

    def __init__(self, database: str, folder: Path) -> None:
        self.database = database
        self.folder = folder
        self.began = monotonic()
        self.home, self.logs, self.counts = (folder / name for name in ("home", "logs", "counts"))
        for each in (self.home, self.logs, self.counts):
            each.mkdir(parents=True)
        self._events = (folder / "events.jsonl").open("a", buffering=1)
        self._lock = threading.Lock()
        self.problems: list[str] = []
        self.server = RedisServer(folder)
        self.server.start()
        self.proxy = FaultProxy(("127.0.0.1", self.server.port))
        self.proxy.__enter__()
        self._postgresql_folder = tempfile.TemporaryDirectory(prefix="batchmill-soak-postgresql-")
        self.postgresql: PostgresqlServer | None = None
        if database == "postgresql":
            self.postgresql = PostgresqlServer(Path(self._postgresql_folder.name))
        self.settings = self._settings()
        upgrade(self.settings.database)
        self.store = Store(self.settings.database)
        self.echo_queue = queue_name(ModelSpec.parse("echo"), self.store.id)
        #: For looks that rather fail than wait.
        self.glance = Store(self.settings.database, busy_seconds=_GLANCE_SECONDS)

    def _settings(self) -> Settings:
        return load_settings(
            home=self.home,
            broker_url=f"redis://127.0.0.1:{self.proxy.port}/0",
            database_url=self.postgresql.url if self.postgresql else "",
            chaos=True,
            engine_rows=ROWS,
            echo_step_seconds=STEP_SECONDS,
        )

    def environ(self) -> dict[str, str]:
        own = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")]), COUNTS_VARIABLE: str(self.counts)}
        return {**os.environ, **environment_of(self.settings), **own}

    @property
    def seconds(self) -> float:
        """Since the soak began."""
        return monotonic() - self.began

    # --- the log ------------------------------------------------------------------------------------------------

    def note(self, what: str, *, aloud: bool = True, **details: Any) -> None:
        """Writes down what happened, and says it."""
        with self._lock:
            self._events.write(json.dumps({"seconds": round(self.seconds, 1), "what": what, **details}) + "\n")
        if aloud:
            said = " ".join(f"{name}={value}" for name, value in details.items())
            print(f"{self.seconds:7.1f}  {what}  {said}", flush=True)

    def problem(self, text: str) -> None:
        """Something that must not be; the soak fails."""
        self.problems.append(text)
        self.note("PROBLEM", text=text)

    # --- commands -----------------------------------------------------------------------------------------------

    def command(
        self, *words: str | Path, kill_after: float | None = None, module: str = "batchmill"
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command to its end, or kills it after so many seconds. One that hangs or dies badly is a problem."""
        line = [sys.executable, "-m", module, *map(str, words)]
        process = subprocess.Popen(
            line,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
            env=self.environ(),
            cwd=self.folder,
        )
        try:
            out, err = process.communicate(timeout=_COMMAND_SECONDS if kill_after is None else kill_after)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            if kill_after is None:
                self.problem(f"{words[0]} did not end in {_COMMAND_SECONDS} s: {err}")
        if "Traceback" in err:
            self.problem(f"{words[0]} printed a traceback: {err}")
        if process.returncode and kill_after is None:
            last = err.strip().splitlines()[-1:]
            self.note("command failed", command=str(words[0]), code=process.returncode, said=last)
        return subprocess.CompletedProcess(line, process.returncode, out, err)

    # --- the end ------------------------------------------------------------------------------------------------

    def redis(self, *, password: str | None = None) -> Redis:
        """Redis, with no proxy between."""
        port = self.server.port
        return Redis("127.0.0.1", port, password=password, socket_timeout=1, socket_connect_timeout=1)

    def end(self) -> None:
        for store in (self.glance, self.store):
            store.close()
        with suppress(Exception):  # what fails here must not keep the rest from being ended
            self.proxy.__exit__()
        self.server.stop()
        if self.postgresql is not None:
            self.postgresql.end()
        with suppress(OSError):
            self._postgresql_folder.cleanup()
        self._events.close()
