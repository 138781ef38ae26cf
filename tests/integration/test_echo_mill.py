"""The whole line with the echo engine: submit, wait, results, cancel, retry, and what dies on the way."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import redis
from kombu import Queue

from batchmill.jobs.broker.client import make_app
from batchmill.jobs.models.spec import ModelSpec
from batchmill.jobs.requests.states import JobState, WorkerState
from tests.integration.conftest import PATIENCE_SECONDS, Mill, child_of, until, write_prompts

SLOW = {"echo_step_seconds": 0.1, "engine_rows": 10}


def check_whole(mill: Mill, job_id: str, count: int) -> None:
    """Every request has its own answer, once, in order."""
    lines = mill.results(job_id)
    assert [line["index"] for line in lines] == list(range(count))
    assert [line["text"] for line in lines] == [f"one two three {index}" for index in range(count)]


def test_submit_to_results_in_every_form(mill: Mill, tmp_path: Path) -> None:
    mill.start("worker", "-m", "echo", "--name", "w1")
    file = tmp_path / "mixed.jsonl"
    chat = {"model": "echo", "messages": [{"role": "user", "content": "hi there"}], "metadata": {"k": "v"}}
    file.write_text(
        '{"prompt": "a b c", "max_tokens": 2}\n'
        + json.dumps({"custom_id": "x", "method": "POST", "url": "/v1/chat/completions", "body": chat})
        + '\n\n{"messages": [{"role": "user", "content": "last"}]}'
    )
    job_id = mill.command("submit", file, "-m", "echo", "--name", "mixed", "--wait").strip()
    lines = mill.results(job_id)
    assert [line["custom_id"] for line in lines] == ["request-0", "x", "request-2"]
    assert [(line["text"], line["finish_reason"]) for line in lines] == [
        ("a b", "length"),
        ("hi there", "stop"),
        ("last", "stop"),
    ]
    assert lines[1]["metadata"] == {"k": "v"}

    out = tmp_path / "out.jsonl"
    for _ in range(2):
        before = out.read_bytes() if out.exists() else None
        mill.command("results", job_id, "--format", "openai", "-o", out)
        assert before in (None, out.read_bytes())
    first = json.loads(out.read_text().splitlines()[1])
    assert first["response"]["body"]["choices"][0]["message"]["content"] == "hi there"
    assert first["response"]["body"]["metadata"] == {"k": "v"}
    assert (tmp_path / "out.errors.jsonl").read_text() == ""

    table = list(csv.DictReader(mill.command("results", job_id, "--format", "csv").splitlines()))
    assert [row["text"] for row in table] == ["a b", "hi there", "last"]
    assert json.loads(table[1]["metadata"]) == {"k": "v"}

    status = mill.status(job_id)
    assert status["state"] == "completed"
    assert status["counts"] == {"total": 3, "succeeded": 3, "failed": 0, "cancelled": 0, "pending": 0}
    assert status["name"] == "mixed"
    assert status["vram"]["peak_allocated_bytes"] > 0
    assert status["versions"]["batchmill"]


def test_a_job_waits_for_a_worker_and_says_who_is_missing(mill: Mill, tmp_path: Path) -> None:
    done = mill.finished("submit", write_prompts(tmp_path / "p.jsonl", 30), "-m", "echo")
    job_id = done.stdout.strip()
    assert "batchmill up -m echo" in done.stderr
    assert mill.status()["unserved_seconds"] >= 0
    assert "batchmill up -m echo" in mill.command("status")
    mill.command("wait", job_id, "--timeout", "0.5", code=124)
    mill.start("worker", "-m", "echo", "--exit-when-idle", "1").wait(60)
    check_whole(mill, job_id, 30)
    assert mill.command("workers", "--json") == "[]\n"
    assert [each["state"] for each in json.loads(mill.command("workers", "--all", "--json"))] == ["stopped"]


def test_sigkill_of_the_child_loses_and_doubles_nothing(mill: Mill, tmp_path: Path) -> None:
    worker = mill.start("worker", "-m", "echo", **SLOW)
    job_id = mill.command("submit", write_prompts(tmp_path / "p.jsonl", 150), "-m", "echo").strip()
    until(lambda: mill.succeeded(job_id) > 20, "some answers")
    before = mill.succeeded(job_id)
    os.kill(child_of(worker), signal.SIGKILL)
    mill.command("wait", job_id, "--timeout", "300")
    check_whole(mill, job_id, 150)
    assert before >= 20
    runs = mill.status(job_id)["runs"]
    assert runs > 3  # three batches, and those that were taken back


def test_a_killed_workers_batches_run_elsewhere(mill: Mill, tmp_path: Path) -> None:
    worker = mill.start("worker", "-m", "echo", **SLOW)
    job_id = mill.command("submit", write_prompts(tmp_path / "p.jsonl", 1_000), "-m", "echo").strip()
    until(lambda: mill.succeeded(job_id) > 10, "some answers")
    worker.kill()
    mill.start("worker", "-m", "echo")
    mill.command("wait", job_id, "--timeout", "300")
    check_whole(mill, job_id, 1_000)


def test_redis_emptied_in_mid_job_costs_seconds(mill: Mill, tmp_path: Path) -> None:
    job_id = mill.command("submit", write_prompts(tmp_path / "p.jsonl", 150), "-m", "echo").strip()
    client = redis.Redis(unix_socket_path=str(mill.home / "redis.sock"))
    assert mill.queue_length(mill.echo_queue) > 0
    client.flushall()
    worker = mill.start("worker", "-m", "echo", **SLOW)
    until(lambda: mill.succeeded(job_id) > 10, "some answers")
    client.flushall()
    os.kill(child_of(worker), signal.SIGKILL)
    client.flushall()
    client.close()
    mill.command("wait", job_id, "--timeout", "300")
    check_whole(mill, job_id, 150)


def test_sigterm_during_work_hands_everything_back_in_time(mill: Mill, tmp_path: Path) -> None:
    worker = mill.start("worker", "-m", "echo", **SLOW)
    job_id = mill.command("submit", write_prompts(tmp_path / "p.jsonl", 1_000), "-m", "echo").strip()
    until(lambda: mill.succeeded(job_id) > 10, "some answers")
    worker.terminate()
    assert worker.wait(PATIENCE_SECONDS) == 0
    job = mill.store.jobs.job(job_id)
    assert job.state is JobState.RUNNING
    assert mill.store.recovery.expired(lease_seconds=-1_000) == {}  # no lease is left
    mill.start("worker", "-m", "echo")
    mill.command("wait", job_id, "--timeout", "300")
    check_whole(mill, job_id, 1_000)


def test_many_copies_of_a_message_to_two_workers_do_no_harm(mill: Mill, tmp_path: Path) -> None:
    workers = [mill.start("worker", "-m", "echo", "--name", name, **SLOW) for name in ("a", "b")]
    until(lambda: len(mill.store.workers.rows()) == 2, "two workers")
    job_id = mill.command("submit", write_prompts(tmp_path / "p.jsonl", 100), "-m", "echo", "--batch-size", "7").strip()
    task = make_app(mill.settings.broker).signature("batchmill.wake")
    for batch_id in [*mill.store.recovery.pending_of(ModelSpec.parse("echo"), most=5), 10**9]:
        for _ in range(10):
            task.apply_async((batch_id,), queue=Queue(mill.echo_queue))
    mill.command("wait", job_id, "--timeout", "300")
    check_whole(mill, job_id, 100)
    until(lambda: mill.queue_length(mill.echo_queue) == 0, "the queue is drained")
    assert all(worker.poll() is None for worker in workers)


def test_cancel_and_retry(mill: Mill, tmp_path: Path) -> None:
    slow = mill.start("worker", "-m", "echo", **SLOW)
    job_id = mill.command("submit", write_prompts(tmp_path / "p.jsonl", 1_000), "-m", "echo").strip()
    until(lambda: mill.succeeded(job_id) > 10, "some answers")
    mill.command("cancel", job_id)
    mill.command("wait", job_id, "--timeout", "20", code=5)
    status = mill.status(job_id)
    assert status["state"] == "cancelled"
    assert status["counts"]["cancelled"] > 0
    assert status["counts"]["pending"] == 0
    lines = mill.results(job_id)
    assert [line["index"] for line in lines] == list(range(1_000))
    assert {line["error"]["code"] for line in lines if line["error"]} == {"cancelled"}
    mill.command("cancel", job_id)
    slow.terminate()
    mill.command("retry", job_id)
    mill.start("worker", "-m", "echo")
    mill.command("wait", job_id, "--timeout", "300")
    check_whole(mill, job_id, 1_000)


def test_results_of_a_running_job_are_those_that_are_there(mill: Mill, tmp_path: Path) -> None:
    mill.start("worker", "-m", "echo", **SLOW)
    job_id = mill.command("submit", write_prompts(tmp_path / "p.jsonl", 3_000), "-m", "echo").strip()
    until(lambda: mill.succeeded(job_id) > 10, "some answers")
    indexes = [line["index"] for line in mill.results(job_id)]
    assert 10 < len(indexes) < 3_000
    assert indexes == sorted(indexes)
    until(lambda: mill.status(job_id)["eta_seconds"] is not None, "an estimate")
    status = mill.status(job_id)
    assert status["eta_low_seconds"] <= status["eta_seconds"] <= status["eta_high_seconds"]
    assert len(status["workers"]) == 1


def test_a_submit_without_redis_is_stored_and_taken_up(mill: Mill, tmp_path: Path) -> None:
    mill.redis.stop()
    done = mill.finished("submit", write_prompts(tmp_path / "p.jsonl", 10), "-m", "echo")
    assert done.returncode == 0
    assert "stored" in done.stderr
    mill.redis.start()
    mill.start("worker", "-m", "echo")
    mill.command("wait", done.stdout.strip(), "--timeout", "300")


def test_a_bad_file_leaves_nothing_behind(mill: Mill, tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text('{"prompt": "a", "custom_id": "x"}\n{"prompt": 1}\n{"prompt": "b", "custom_id": "x"}\n')
    done = mill.finished("submit", file, "-m", "echo")
    assert done.returncode == 2
    assert done.stdout == ""
    assert f"{file}:2: " in done.stderr
    assert f"{file}:3: duplicate custom_id 'x', first used at line 1" in done.stderr
    assert "2 bad lines" in done.stderr
    assert mill.store.jobs.jobs(most=1) == []
    assert mill.queue_length(mill.echo_queue) == 0


def test_stdin_is_read_as_a_stream(mill: Mill) -> None:
    mill.start("worker", "-m", "echo")
    lines = '{"prompt": "from a pipe", "model": "echo"}\n'
    job_id = mill.command("submit", "-", "--wait", stdin=lines).strip()
    assert mill.results(job_id)[0]["text"] == "from a pipe"


def test_a_supervised_worker_is_replaced_when_it_dies(mill: Mill, tmp_path: Path) -> None:
    mill.start("worker", "-m", "echo", "--devices", "cpu")
    until(lambda: mill.store.workers.rows(), "a worker")
    first = mill.store.workers.rows()[0]
    os.kill(first.pid, signal.SIGKILL)
    until(lambda: any(row.pid != first.pid for row in mill.store.workers.rows()), "another worker")
    job_id = mill.command("submit", write_prompts(tmp_path / "p.jsonl", 10), "-m", "echo", "--wait").strip()
    check_whole(mill, job_id, 10)


def test_a_flag_of_a_worker_reaches_its_child_before_the_environment_and_is_shown(mill: Mill) -> None:
    worker = mill.start("worker", "-m", "echo", "--max-rows", "7", "--devices", "cpu", engine_rows=5)
    until(lambda: [each.state for each in mill.store.workers.rows()] == [WorkerState.READY], "a worker is ready")
    (found,) = json.loads(mill.command("workers", "--json"))
    assert (found["engine"], found["rows"], found["context_tokens"], found["cache_tokens"]) == ("echo", 7, None, None)
    assert "echo: 7 rows  up" in mill.command("workers")
    worker.terminate()
    said, _ = worker.communicate(timeout=PATIENCE_SECONDS)
    assert re.search(r"ready .*engine=echo .*rows=7", said), said


@pytest.mark.parametrize("words", [["status"], ["results", "zzz"], ["cancel", "zzz"], ["retry", "zzz"], ["wait", "x"]])
def test_a_job_that_is_not_there_is_exit_3(mill: Mill, words: list[str]) -> None:
    done = mill.finished(*words)
    assert done.returncode == 3
    assert done.stderr.count("\n") == 1
    assert ("`batchmill submit` make one" if words == ["status"] else "batchmill jobs") in done.stderr


def test_a_reader_that_goes_away_is_no_error(mill: Mill, tmp_path: Path) -> None:
    mill.start("worker", "-m", "echo")
    job_id = mill.command("submit", write_prompts(tmp_path / "p.jsonl", 5_000), "-m", "echo", "--wait").strip()
    command = f"{sys.executable} -m batchmill results {job_id} | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env=mill.environ())
    assert json.loads(done.stdout)["index"] == 0
    assert "Traceback" not in done.stderr
