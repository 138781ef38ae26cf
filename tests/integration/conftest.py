"""A whole mill for a test: real Redis, real store, real worker processes, the real command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis

from batchmill.jobs.broker.embedded import EmbeddedRedis
from batchmill.jobs.broker.queue_name import queue_name
from batchmill.jobs.configuration.settings import Settings, environment_of, load_settings
from batchmill.jobs.models.spec import ModelSpec
from batchmill.jobs.store.store import Store
from tests.support.processes import forked

#: The longest that a test waits for an event. No promise, since a busy machine may be slow: a soak measures promises.
PATIENCE_SECONDS = 300

#: Short timers with the proportions of the real ones.
TIMERS = {
    "heartbeat_seconds": 0.5,
    "lease_seconds": 4.0,
    "save_seconds": 0.2,
    "reconcile_seconds": 0.5,
    "drain_seconds": 8.0,
}


Done = subprocess.CompletedProcess[str]


class Mill:
    """One home with its own Redis; commands run in it as a user would run them."""

    def __init__(self, home: Path, settings: Settings) -> None:
        self.home = home
        self.settings = settings
        self.redis = EmbeddedRedis(home)
        self.store = Store(settings.database)
        self._started: list[subprocess.Popen[str]] = []

    def environ(self, **settings: object) -> dict[str, str]:
        own = environment_of(self.settings) | {f"BATCHMILL_{name.upper()}": str(v) for name, v in settings.items()}
        return {**os.environ, **own}

    def command(self, *words: str | Path, stdin: str | None = None, code: int = 0, **settings: object) -> str:
        """Runs a command to its end: its stdout. The exit code has to be `code`."""
        done = self.finished(*words, stdin=stdin, **settings)
        assert done.returncode == code, f"{words}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def finished(self, *words: str | Path, stdin: str | None = None, **settings: object) -> Done:
        return forked.finished(words, stdin=stdin, env=self.environ(**settings))

    def start(self, *words: str | Path, **settings: object) -> subprocess.Popen[str]:
        """Starts a command that goes on; it is ended with the test."""
        process = subprocess.Popen(
            [sys.executable, "-m", "batchmill", *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=self.environ(**settings),
        )
        self._started.append(process)
        return process

    def status(self, job: str = "last") -> dict[str, Any]:
        status: dict[str, Any] = json.loads(self.command("status", job, "--json"))
        return status

    def succeeded(self, job_id: str) -> int:
        return self.store.jobs.job(job_id).counts.succeeded

    def results(self, job: str = "last") -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.command("results", job).splitlines()]

    @property
    def echo_queue(self) -> str:
        return queue_name(ModelSpec.parse("echo"), self.store.id)

    def queue_length(self, queue: str) -> int:
        """Counts the wake-ups in a queue."""
        with redis.Redis(unix_socket_path=str(self.home / "redis.sock")) as client:
            return int(client.llen(f"batchmill:{queue}"))

    def end(self) -> None:
        for process in self._started:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self._started:
            try:
                process.communicate(timeout=PATIENCE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
        self.redis.stop()
        self.store.close()


@pytest.fixture
def mill(sqlite_template: Path, tmp_path: Path) -> Iterator[Mill]:
    """A mill on SQLite with a private Redis, and no worker yet."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "batchmill.db").write_bytes(sqlite_template.read_bytes())
    mill = Mill(home, load_settings(home=home, **TIMERS))
    mill.redis.start()
    yield mill
    mill.end()


def write_prompts(path: Path, count: int, *, text: str = "one two three") -> Path:
    path.write_text("".join(json.dumps({"prompt": f"{text} {index}"}) + "\n" for index in range(count)))
    return path


def child_of(worker: subprocess.Popen[str]) -> int:
    """The pid of the process that holds the model."""
    found: list[int] = []

    def look() -> bool:
        children = psutil.Process(worker.pid).children()
        found[:] = [each.pid for each in children if "spawn_main" in " ".join(each.cmdline())]
        return bool(found)

    until(look, "the worker has a child")
    return found[0]


def until(condition: Callable[[], object], what: str, *, seconds: float = PATIENCE_SECONDS) -> None:
    """Waits for a condition; fails the test, saying what did not happen."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.05)
