"""`up`: a mill that stays, takes jobs from other terminals and runs, and starts its Redis again."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

from batchmill.jobs.requests.states import WorkerState
from tests.integration.conftest import PATIENCE_SECONDS, until, write_prompts
from tests.support.processes.home import Home, texts


def test_a_second_run_or_up_in_the_same_home_is_refused_by_pid(home: Home, tmp_path: Path) -> None:
    file = write_prompts(tmp_path / "p.jsonl", 10)
    mill = home.start("up", "-m", "echo")
    until(lambda: (home.path / "mill.pid").exists(), "the mill is up")
    for words in (("run", file, "-m", "demo"), ("up", "-m", "echo")):
        assert f"pid {mill.pid}" in home.run(*words, code=1).stderr
    mill.terminate()
    mill.communicate(timeout=PATIENCE_SECONDS)


def test_a_likely_slip_in_the_name_of_a_model_is_told_of(home: Home) -> None:
    up = home.start("up", "-m", "dmeo")
    assert up.stderr is not None
    assert any("did you mean demo?" in line for line in up.stderr)


def test_a_mill_that_is_up_takes_jobs_from_other_terminals(home: Home, tmp_path: Path) -> None:
    file = write_prompts(tmp_path / "p.jsonl", 10)
    mill = home.start("up", "-m", "echo", "--device", "cpu")
    until(lambda: (home.path / "redis.sock").exists(), "the mill is up")
    done = home.run("submit", file, "-m", "echo", "--wait")
    assert len(done.stdout.strip()) == 8
    assert "doctor" in home.run("--help").stdout
    checks = {each["name"]: each for each in json.loads(home.run("doctor", "--json").stdout)}
    assert checks["redis"]["ok"]
    assert checks["database"]["ok"]
    mill.send_signal(signal.SIGINT)
    _, said = mill.communicate(timeout=PATIENCE_SECONDS)
    assert mill.returncode == 0, said


def test_a_run_beside_an_up_that_holds_its_model_is_answered_by_that_one(home: Home, tmp_path: Path) -> None:
    file, out = write_prompts(tmp_path / "p.jsonl", 10), tmp_path / "out.jsonl"
    mill = home.start("up", "-m", "echo", "--device", "cpu")
    until(lambda: [each["state"] for each in home.workers()] == ["ready"], "a worker is ready")
    done = home.run("run", file, "-m", "echo", "-o", out)
    assert f"worker {home.workers()[0]['name']}, which already holds echo (none) here, answers it" in done.stderr
    assert texts(out) == [f"one two three {index}" for index in range(10)]
    again = home.run("run", file, "-m", "echo", "-o", out).stderr
    assert "ran this file before" in again
    assert "answers it" not in again
    assert "omit the flags" in home.run("run", file, "-m", "echo", "--device", "cpu", code=1).stderr
    assert "another `batchmill run` or `up`" in home.run("run", file, "-m", "demo", code=1).stderr
    asked = home.run("submit", file, "-m", "demo")
    assert "batchmill worker -m demo -q nf4" in asked.stderr
    mill.send_signal(signal.SIGINT)
    _, said = mill.communicate(timeout=PATIENCE_SECONDS)
    assert mill.returncode == 0, said
    assert "the rest returns to the queue" in said
    assert "Warm shutdown" not in said
    assert "batchmill up -m demo -q nf4" in home.run("status").stdout
    refused = home.run("worker", "-m", "demo", "-q", "nf4", code=1)
    assert "`batchmill up -m demo -q nf4` starts one" in refused.stderr


def test_a_redis_that_ends_is_started_again(home: Home, tmp_path: Path) -> None:
    mill = home.start("up", "-m", "echo", "--device", "cpu")
    until(home.worker_states, "the mill is up")  # a Redis that ends before it answers ends `up`
    for number in range(2):
        (old,) = home.redis_pids()
        os.kill(old, signal.SIGKILL)
        home.run("submit", write_prompts(tmp_path / f"{number}.jsonl", 10), "-m", "echo", "--wait")
        until(lambda old=old: home.redis_pids() not in ([], [old]), "another Redis is there")
    checks = {each["name"]: each for each in json.loads(home.run("doctor", "--json").stdout)}
    assert checks["redis"]["ok"]
    mill.send_signal(signal.SIGINT)
    _, said = mill.communicate(timeout=PATIENCE_SECONDS)
    assert mill.returncode == 0, said
    assert said.count("the embedded Redis had ended and is started again") == 2


def test_what_the_flags_of_up_ask_of_the_engine_reaches_the_worker(home: Home) -> None:
    mill = home.start("up", "-m", "echo", "--max-rows", "7", "--context", "100", BATCHMILL_ENGINE_ROWS="5")
    found: list[dict[str, Any]] = []

    def ready() -> bool:
        found[:] = [each for each in home.workers() if each["state"] == "ready"]
        return bool(found)

    until(ready, "a worker is ready")
    assert (found[0]["engine"], found[0]["rows"]) == ("echo", 7)
    mill.terminate()
    mill.communicate(timeout=PATIENCE_SECONDS)


def test_doctor_tells_of_an_embedded_redis_that_runs_and_does_not_answer(home: Home) -> None:
    home.start("up", "-m", "echo", "--device", "cpu")
    until(lambda: home.worker_states() == [WorkerState.READY], "the mill is up")
    (server,) = home.redis_pids()
    os.kill(server, signal.SIGSTOP)
    try:
        done = home.run("doctor", code=1)
    finally:
        os.kill(server, signal.SIGCONT)
    assert f"embedded, pid {server}, does not answer" in done.stdout
