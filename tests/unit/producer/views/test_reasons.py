"""Reasons why nobody serves a job: the command that starts a worker, or the mill that does."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from socket import gethostname
from time import monotonic, sleep

import pytest
from sqlalchemy import update

from batchmill.jobs.configuration.settings import load_settings
from batchmill.jobs.models.spec import ModelSpec
from batchmill.jobs.requests.states import WorkerState
from batchmill.jobs.runtime.process.pid_file import PidFile
from batchmill.jobs.runtime.process.process import Process
from batchmill.jobs.store.store import Store
from batchmill.jobs.store.tables import workers
from batchmill.producer.views.reasons import missing_lines
from batchmill.producer.views.status import JobStatus
from tests.support.store import mill


def test_a_job_whose_last_worker_has_ended_says_since_when(store: Store) -> None:
    job_id = mill.load(store, 3)
    store.registration.enter(mill.session(store).worker_id, WorkerState.STOPPED)
    first, _ = missing_lines(JobStatus.read(store, job_id))
    assert re.fullmatch(r"no live worker has served echo \(none\) for \d+ s; start one:", first)


def test_a_worker_bound_to_another_job_serves_nobody_else(store: Store) -> None:
    job_id = mill.load(store, 3)
    mill.session(store, only_job="another")
    assert JobStatus.read(store, job_id).missing_seconds is not None


def test_a_worker_that_is_silent_while_its_process_lives_has_not_ended(store: Store) -> None:
    home = load_settings().home
    home.mkdir(parents=True, exist_ok=True)
    (home / "mill.pid").write_text(f"{Process.own()}\n")
    job_id = mill.load(store, 3)
    mill.session(store, process=Process.own(), host=gethostname())

    def said_after(seconds: float) -> str:
        earlier = {"heartbeat_at": workers.c.heartbeat_at - seconds, "alive_until": workers.c.alive_until - seconds}
        with store.database.write() as connection:
            connection.execute(update(workers).values(earlier))
        return " ".join(missing_lines(JobStatus.read(store, job_id)))

    silent = r"worker w has not been heard of for \d+ s, and its process lives"
    assert re.fullmatch(silent, said_after(30))
    assert not re.fullmatch(silent, said_after(3_600))


class TestAMillThatStarts:
    """A job beside an `up` or `run` whose worker is not in the store yet."""

    @pytest.fixture
    def home(self) -> Path:
        home = load_settings().home
        home.mkdir(parents=True, exist_ok=True)
        (home / "mill.pid").write_text(f"{Process.own()}\n")
        return home

    @pytest.fixture
    def serve(self, home: Path) -> Iterator[Callable[..., None]]:
        """Starts a process that has the command line of a mill's workers."""
        started: list[subprocess.Popen[bytes]] = []

        def serve(*words: str) -> None:
            started.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", *words]))
            PidFile(home / "worker.pid").write(started[-1].pid)
            until = monotonic() + 30
            while not PidFile(home / "worker.pid").command_line[3:] and monotonic() < until:
                sleep(0.01)

        yield serve
        for each in started:
            each.kill()
            each.wait()

    def said(self, store: Store, job_id: str) -> str:
        return " ".join(missing_lines(JobStatus.read(store, job_id)))

    def test_starts_a_worker_that_nobody_else_has_to(self, store: Store, home: Path) -> None:
        (home / "worker.pid").write_text(f"{Process.own()}\n".replace("1.", "1.9", 1))
        said = self.said(store, mill.load(store, 3))
        assert said == "no worker serves echo (none) yet: the mill here is starting its worker"
        (home / "mill.pid").unlink()
        assert "; start one: batchmill" in self.said(store, mill.load(store, 3))

    def test_starts_that_of_its_own_model_alone(self, store: Store, serve: Callable[..., None]) -> None:
        job_id, other = mill.load(store, 3), mill.load(store, 3, spec=ModelSpec("demo"))
        serve("-m", "echo", "--devices", "cpu")
        assert self.said(store, job_id).endswith(": the mill here is starting its worker")
        assert "; start one: batchmill worker -m demo" in self.said(store, other)
        mill.session(store)
        assert self.said(store, job_id) == ""

    def test_starts_that_of_a_run_for_its_job_alone(self, store: Store, serve: Callable[..., None]) -> None:
        job_id, other = mill.load(store, 3), mill.load(store, 3)
        serve("-m", "echo", "--job", job_id, "--devices", "cpu")
        assert self.said(store, job_id).endswith(": the mill here is starting its worker")
        assert "; start one: batchmill worker" in self.said(store, other)

    def test_says_that_its_worker_is_sick(self, store: Store, serve: Callable[..., None]) -> None:
        job_id = mill.load(store, 3)
        store.registration.enter(mill.session(store).worker_id, WorkerState.SICK, error="Xid 79")
        serve("-m", "echo", "--devices", "cpu")
        assert "is sick: Xid 79" in self.said(store, job_id)
