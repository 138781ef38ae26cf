"""SIGTERM in every phase, a frozen child: the worker ends in time and nothing is lost."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil

from jobs.states import WorkerState
from tests.integration.conftest import Mill, child_of, until, write_prompts

SLOW = {"echo_step_seconds": 0.1, "engine_rows": 10}


def state(mill: Mill) -> WorkerState | None:
    found = mill.store.workers.rows(only_alive=False)
    return found[-1].state if found else None


def test_sigterm_while_the_model_loads(mill: Mill) -> None:
    worker = mill.start("worker", "-m", "demo", "--device", "cpu")
    until(lambda: state(mill) is WorkerState.LOADING, "the model is being loaded")
    worker.terminate()
    assert worker.wait(20) == 0
    assert state(mill) is WorkerState.STOPPED
    assert not any("worker" in " ".join(each.cmdline()) for each in psutil.Process().children(recursive=True))


def test_sigterm_right_after_the_start(mill: Mill) -> None:
    worker = mill.start("worker", "-m", "echo")
    until(lambda: state(mill) is not None, "the worker has registered")
    worker.terminate()
    assert worker.wait(20) == 0


def test_ctrl_c_at_a_worker_hands_everything_back(mill: Mill, tmp_path: Path) -> None:
    worker = mill.start("worker", "-m", "echo", **SLOW)
    job_id = mill.command("submit", write_prompts(tmp_path / "p.jsonl", 1_000), "-m", "echo").strip()
    until(lambda: mill.succeeded(job_id) > 10, "some answers")
    worker.send_signal(signal.SIGINT)
    assert worker.wait(20) == 0
    assert mill.store.recovery.expired(for_seconds=-1_000) == {}


def test_a_child_that_does_not_hand_back_in_time_is_killed(mill: Mill, tmp_path: Path) -> None:
    worker = mill.start("worker", "-m", "echo", drain_seconds=1.0, **SLOW)
    job_id = mill.command("submit", write_prompts(tmp_path / "p.jsonl", 1_000), "-m", "echo").strip()
    until(lambda: mill.succeeded(job_id) > 10, "some answers")
    os.kill(child_of(worker), signal.SIGSTOP)
    worker.terminate()
    assert worker.wait(20) == 0
    assert mill.store.recovery.expired(for_seconds=-1_000) == {}  # the parent took the leases back


def test_a_frozen_child_loses_its_lease_and_writes_nothing_when_it_wakes(mill: Mill, tmp_path: Path) -> None:
    frozen = mill.start("worker", "-m", "echo", "--name", "frozen", **SLOW)
    job_id = mill.command("submit", write_prompts(tmp_path / "p.jsonl", 1_000), "-m", "echo").strip()
    until(lambda: mill.succeeded(job_id) > 10, "some answers")
    child = child_of(frozen)
    os.kill(child, signal.SIGSTOP)
    mill.start("worker", "-m", "echo", "--name", "other")
    mill.command("wait", job_id, "--timeout", "60")
    answers = mill.results(job_id)
    os.kill(child, signal.SIGCONT)
    until(lambda: all(row.leases == 0 for row in mill.store.workers.rows()), "the frozen one has let go")
    assert mill.results(job_id) == answers
    assert [line["index"] for line in answers] == list(range(1_000))


def test_the_whole_line_on_postgresql(postgresql_url: str, mill: Mill, tmp_path: Path) -> None:
    settings = {"database_url": postgresql_url}
    mill.start("worker", "-m", "echo", **settings)
    file = write_prompts(tmp_path / "p.jsonl", 300)
    job_id = mill.command("submit", file, "-m", "echo", "--wait", **settings).strip()
    lines = mill.command("results", job_id, **settings).splitlines()
    assert len(lines) == 300
    assert "300 succeeded" in mill.command("status", job_id, **settings)
