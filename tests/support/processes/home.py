"""A home for `run` and `up`, with commands in it, and what they left: jobs, workers and processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import psutil

from batchmill.jobs.configuration.settings import environment_of, load_settings
from batchmill.jobs.errors import StoreError
from batchmill.jobs.requests.states import WorkerState
from batchmill.jobs.store.store import Store
from batchmill.jobs.store.views.jobs import Job
from batchmill.jobs.store.views.workers import WorkerRow
from tests.integration.conftest import TIMERS
from tests.support.processes import forked


class Home:
    """A home in which `run` and `up` start all that they need; commands run in it as a user would run them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.settings = load_settings(home=path, **TIMERS)
        self.environ = {**os.environ, **environment_of(self.settings)}
        self._started: list[subprocess.Popen[str]] = []

    def run(self, *words: str | Path, code: int = 0, **settings: str) -> subprocess.CompletedProcess[str]:
        done = forked.finished(words, env=self.environ | settings)
        assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def start(self, *words: str | Path, stdin: int | None = None, **settings: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "batchmill", *map(str, words)],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.environ | settings,
        )
        self._started.append(process)
        return process

    def succeeded(self) -> int:
        """Counts the answers of the newest job; 0 while there is none."""
        if not (self.path / "batchmill.db").exists():
            return 0
        store = Store(self.settings.database)
        try:
            jobs = store.jobs.jobs(most=1) if store.revision() else []
            return jobs[0].counts.succeeded if jobs else 0
        finally:
            store.close()

    def workers(self) -> list[dict[str, Any]]:
        workers: list[dict[str, Any]] = json.loads(self.run("workers", "--json").stdout)
        return workers

    def rows(self) -> list[WorkerRow]:
        with closing(Store(self.settings.database)) as store:
            return store.workers.rows(only_alive=False)

    def worker_states(self) -> list[WorkerState]:
        """The states of all its workers; empty while the home has no store yet."""
        with suppress(StoreError):
            return [each.state for each in self.rows()]
        return []

    def jobs(self) -> list[Job]:
        with closing(Store(self.settings.database)) as store:
            return store.jobs.jobs(most=10)

    def processes(self) -> list[str]:
        """Command lines of the processes that belong to this home."""
        lines = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("BATCHMILL_HOME") == str(self.path) and process.pid != os.getpid():
                    lines.append(" ".join(process.cmdline()))
            except psutil.Error:
                continue
        return lines

    def redis_pids(self) -> list[int]:
        """The pids of its embedded Redis: one while it runs."""
        pids = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if str(self.path / "redis.sock") in " ".join(process.cmdline()):
                    pids.append(process.pid)
        return pids

    def end(self) -> None:
        """Kills the commands that `start` started, and that still run."""
        for process in self._started:
            if process.poll() is None:
                process.kill()
            process.communicate()


def texts(path: Path) -> list[str]:
    """The text of each line of an export."""
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]
