"""SIGTERM in every phase, a frozen child: the worker ends in time and nothing is lost."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest
from sqlalchemy import func, select

from batchmill.jobs.broker.embedded import start_process
from batchmill.jobs.requests.states import JobState, WorkerState
from batchmill.jobs.store.tables import batches
from tests.integration.conftest import PATIENCE_SECONDS, Mill, child_of, until, write_prompts

SLOW = {"echo_step_seconds": 0.1, "engine_rows": 10}


def state(mill: Mill) -> WorkerState | None:
    found = mill.store.workers.rows(only_alive=False)
    return found[-1].state if found else None


def test_sigterm_while_the_model_loads(mill: Mill) -> None:
    worker = mill.start("worker", "-m", "demo", "--device", "cpu")
    until(lambda: state(mill) is WorkerState.LOADING, "the model is being loaded")
    worker.terminate()
    assert worker.wait(PATIENCE_SECONDS) == 0
    assert state(mill) is WorkerState.STOPPED
    assert not any("worker" in " ".join(each.cmdline()) for each in psutil.Process().children(recursive=True))


def test_sigterm_right_after_the_start(mill: Mill) -> None:
    worker = mill.start("worker", "-m", "echo")
    until(lambda: state(mill) is not None, "the worker has registered")
    worker.terminate()
    assert worker.wait(PATIENCE_SECONDS) == 0


def test_sigterm_in_the_very_first_moment(mill: Mill) -> None:
    """A worker that a supervisor starts has not run one instruction of Python yet."""
    words = [sys.executable, "-P", "-m", "batchmill.worker", "-m", "echo"]
    for _ in range(3):
        worker = start_process(words, log=sys.stderr.buffer, environ=mill.environ(), blocks_sigterm=True)
        worker.terminate()
        assert worker.wait(PATIENCE_SECONDS) == 0
    assert state(mill) in (None, WorkerState.STOPPED)


def test_sigterm_while_a_command_becomes_the_worker(mill: Mill) -> None:
    for _ in range(3):
        worker = mill.start("worker", "-m", "echo")
        while "-P" not in psutil.Process(worker.pid).cmdline():
            assert worker.poll() is None
        worker.terminate()
        assert worker.wait(PATIENCE_SECONDS) == 0


def test_ctrl_c_at_a_worker_hands_everything_back(mill: Mill, tmp_path: Path) -> None:
    worker = mill.start("worker", "-m", "echo", **SLOW)
    job_id = mill.command("submit", write_prompts(tmp_path / "p.jsonl", 1_000), "-m", "echo").strip()
    until(lambda: mill.succeeded(job_id) > 10, "some answers")
    worker.send_signal(signal.SIGINT)
    assert worker.wait(PATIENCE_SECONDS) == 0
    assert mill.store.recovery.expired(lease_seconds=-1_000) == {}


def test_a_child_that_does_not_hand_back_in_time_is_killed(mill: Mill, tmp_path: Path) -> None:
    worker = mill.start("worker", "-m", "echo", drain_seconds=1.0, **SLOW)
    job_id = mill.command("submit", write_prompts(tmp_path / "p.jsonl", 1_000), "-m", "echo").strip()
    until(lambda: mill.succeeded(job_id) > 10, "some answers")
    os.kill(child_of(worker), signal.SIGSTOP)
    worker.terminate()
    assert worker.wait(PATIENCE_SECONDS) == 0
    assert mill.store.recovery.expired(lease_seconds=-1_000) == {}  # the parent took the leases back


def test_a_child_that_hangs_ends_with_its_parent(mill: Mill, tmp_path: Path) -> None:
    worker = mill.start("worker", "-m", "echo", chaos=True, **SLOW)
    child = psutil.Process(child_of(worker))
    (tmp_path / "p.jsonl").write_text('{"prompt": "!hang"}\n')
    job_id = mill.command("submit", tmp_path / "p.jsonl", "-m", "echo").strip()
    until(lambda: mill.store.jobs.job(job_id).state is JobState.RUNNING, "it is at work")
    worker.kill()
    until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, "the child is gone")


def test_a_frozen_child_loses_its_lease_and_writes_nothing_when_it_wakes(mill: Mill, tmp_path: Path) -> None:
    frozen = mill.start("worker", "-m", "echo", "--name", "frozen", **SLOW)
    job_id = mill.command("submit", write_prompts(tmp_path / "p.jsonl", 1_000), "-m", "echo").strip()
    until(lambda: mill.succeeded(job_id) > 10, "some answers")
    child = child_of(frozen)
    os.kill(child, signal.SIGSTOP)
    mill.start("worker", "-m", "echo", "--name", "other")
    mill.command("wait", job_id, "--timeout", "300")
    answers = mill.results(job_id)
    os.kill(child, signal.SIGCONT)
    until(lambda: all(row.leases == 0 for row in mill.store.workers.rows()), "the frozen one has let go")
    assert mill.results(job_id) == answers
    assert [line["index"] for line in answers] == list(range(1_000))


@pytest.mark.parametrize("whole", [False, True], ids=["the child", "the worker"])
def test_a_pause_longer_than_a_stall_ends_no_process_and_blames_nobody(mill: Mill, tmp_path: Path, whole: bool) -> None:
    worker = mill.start("worker", "-m", "echo", stall_seconds=1.0, **SLOW)
    job_id = mill.command("submit", write_prompts(tmp_path / "p.jsonl", 300), "-m", "echo").strip()
    until(lambda: mill.succeeded(job_id) > 10, "some answers")
    child = child_of(worker)
    for _ in range(2):
        paused = [child, worker.pid] if whole else [child]
        for pid in paused:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(2.5)
        for pid in reversed(paused):
            os.kill(pid, signal.SIGCONT)
        before = mill.succeeded(job_id)
        until(lambda before=before: mill.succeeded(job_id) > before, "it goes on")
    assert child_of(worker) == child
    mill.command("wait", job_id, "--timeout", "300")
    with mill.store.database.read() as connection:
        assert connection.scalar(select(func.max(batches.c.crashes))) == 0
    assert {line["index"] for line in mill.results(job_id) if line["error"] is None} == set(range(300))


def test_the_whole_line_on_postgresql(postgresql_url: str, mill: Mill, tmp_path: Path) -> None:
    settings = {"database_url": postgresql_url}
    mill.start("worker", "-m", "echo", **settings)
    file = write_prompts(tmp_path / "p.jsonl", 300)
    job_id = mill.command("submit", file, "-m", "echo", "--wait", **settings).strip()
    lines = mill.command("results", job_id, **settings).splitlines()
    assert len(lines) == 300
    assert "300 succeeded" in mill.command("status", job_id, **settings)
