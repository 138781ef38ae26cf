"""The log lines of a real worker: kept in its file, and found by its name, its id and its jobs."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner

from batchmill.jobs.requests.states import WorkerState
from batchmill.jobs.runtime.log_file import log_path, logs_folder, worker_of
from batchmill.producer.cli.jobs import logs
from tests.integration.conftest import PATIENCE_SECONDS, Mill, until, write_prompts


def logs_of(mill: Mill, *words: str) -> str:
    done = CliRunner().invoke(logs, words, env=mill.environ(), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_what_a_worker_said_is_found_by_its_name_its_id_and_its_jobs(mill: Mill, tmp_path: Path) -> None:
    files = [write_prompts(tmp_path / f"{name}.jsonl", 3, text=f"secret-{name}") for name in "ab"]
    first, second = (mill.command("submit", file, "-m", "echo").strip() for file in files)
    words = ("worker", "-m", "echo", "--name", "night shift", "--exit-when-idle", "1")
    mill.command(*words)
    mill.command(*words)
    (row, _) = mill.store.workers.rows(only_alive=False)
    for which in ("night shift", str(row.id)):
        assert logs_of(mill, which).count("worker starts") == 2
    for job_id, other in ((first, second), (second, first)):
        about = logs_of(mill, job_id)
        assert "batch begins" in about
        assert "batch finished" in about
        assert job_id in about
        assert other not in about
    assert logs_of(mill, "last") == logs_of(mill, second)
    assert logs_of(mill, "--level", "error") == ""
    assert "secret" not in logs_of(mill)


@pytest.mark.parametrize("hindered", ["by a full disk", "by a folder that cannot be made"])
def test_a_worker_without_a_log_works(mill: Mill, tmp_path: Path, hindered: str) -> None:
    if hindered == "by a full disk":
        logs_folder(mill.home).mkdir()
        log_path(mill.home, "a").symlink_to("/dev/full")
    else:
        logs_folder(mill.home).touch()
    mill.command("submit", write_prompts(tmp_path / "a.jsonl", 3), "-m", "echo")
    done = mill.finished("worker", "-m", "echo", "--name", "a", "--exit-when-idle", "1")
    assert done.returncode == 0, done.stderr
    assert ("this worker keeps no log file" in done.stderr) == (hindered != "by a full disk")
    assert "Logging error" not in done.stderr
    assert mill.status()["counts"]["succeeded"] == 3


def test_why_a_worker_ended_is_in_its_log(mill: Mill, tmp_path: Path) -> None:
    done = mill.finished("worker", "-m", tmp_path, "--name", "a", log_format="json")
    assert done.returncode == 1
    said = json.loads(logs_of(mill, "a", "--level", "error").splitlines()[-1])
    assert (said["event"], said["level"]) == ("the worker ends", "error")
    assert done.stderr.splitlines()[-1] == f"batchmill: {said['reason']}"
    assert "config.json" in said["reason"]


def test_who_follows_sees_what_comes_until_ctrl_c(mill: Mill, tmp_path: Path) -> None:
    words = ("worker", "-m", "echo", "--name", "a", "--exit-when-idle", "1")
    mill.command("submit", write_prompts(tmp_path / "a.jsonl", 3), "-m", "echo")
    mill.command(*words)
    following = mill.start("logs", "--follow")
    assert following.stdout is not None
    seen = [following.stdout.readline()]
    assert "worker starts" in seen[0]
    job_id = mill.command("submit", write_prompts(tmp_path / "b.jsonl", 3), "-m", "echo").strip()
    mill.command(*words)
    while f"job={job_id}" not in seen[-1]:
        seen.append(following.stdout.readline())
        assert seen[-1] != "", seen
    assert len(set(seen)) == len(seen)
    following.send_signal(signal.SIGINT)
    assert following.wait(PATIENCE_SECONDS) == 130


def write_magic(path: Path, magic: str) -> Path:
    path.write_text(json.dumps({"prompt": magic}) + "\n")
    return path


@pytest.mark.parametrize(("magic", "end"), [("!kill9", "SIGKILL"), ("!sticky", "exit code 1")])
def test_how_a_child_died_is_told_of_its_worker_and_of_its_job(
    mill: Mill, tmp_path: Path, magic: str, end: str
) -> None:
    job_id = mill.command("submit", write_magic(tmp_path / "a.jsonl", magic), "-m", "echo").strip()
    mill.command("worker", "-m", "echo", "--name", "a", "--exit-when-idle", "1", chaos=True, log_format="json")
    said = [json.loads(line) for line in logs_of(mill, job_id, "--level", "warning").splitlines()]
    died = next(each for each in said if each["event"] == "the child died")
    assert (died["worker"], died["ended_by"], died["jobs"]) == (1, end, [job_id])
    taken = next(each for each in said if each["event"] == "took back leases")
    assert (taken["worker"], taken["job"], taken["batches"], taken["outcome"]) == (1, job_id, 1, "crashed")


def test_how_a_child_died_is_told_also_after_its_tracker_of_semaphores_was_killed(mill: Mill) -> None:
    worker = mill.start("worker", "-m", "echo", "--name", "a", log_format="json")
    for generation in (1, 2, 3):  # the second tracker knows the semaphores of the first
        until(lambda: generation_ready(mill) == generation, "the child has begun")  # noqa: B023
        if generation < 3:
            kill(worker.pid, "billiard.semaphore_tracker")
            kill(worker.pid, "spawn_main")
    worker.send_signal(signal.SIGTERM)
    said, _ = worker.communicate(timeout=PATIENCE_SECONDS)
    assert "Traceback" not in said
    assert "Error" not in said
    died = [json.loads(line) for line in said.splitlines() if '"the child died"' in line]
    assert [each["ended_by"] for each in died] == ["SIGKILL", "SIGKILL"]


def generation_ready(mill: Mill) -> int:
    """The generation of the only worker's child, once it holds its model."""
    rows = mill.store.workers.rows()
    return rows[0].generation if rows and rows[0].state is WorkerState.READY else 0


def kill(parent: int, what: str) -> None:
    """Kills the child of which the command line says this, and sees it end."""
    living = (each for each in psutil.Process(parent).children() if each.status() != psutil.STATUS_ZOMBIE)
    (found,) = [each for each in living if what in " ".join(each.cmdline())]
    found.kill()
    until(lambda: not found.is_running() or found.status() == psutil.STATUS_ZOMBIE, "it has ended")


def test_the_end_of_a_worker_that_was_killed_is_in_the_log_of_its_supervisor(mill: Mill, tmp_path: Path) -> None:
    job_id = mill.command("submit", write_magic(tmp_path / "a.jsonl", "!hang"), "-m", "echo").strip()
    mill.start("worker", "-m", "echo", "--devices", "cpu", chaos=True, drain_seconds=1.0)

    def ready() -> list[Path]:
        return [path for path in logs_folder(mill.home).glob("cpu-*.log") if "batch begins" in path.read_text()]

    until(ready, "the worker has said that it is at work")
    pid = int(worker_of(ready()[0]).removeprefix("cpu-"))
    os.kill(pid, signal.SIGKILL)
    path = log_path(mill.home, "supervisor")
    until(lambda: f"ended_by=SIGKILL exit_code=-9 pid={pid}" in path.read_text(), "the supervisor says how it ended")
    until(lambda: "took back leases" in logs_of(mill, job_id, "--level", "warning"), "the next worker tells of the job")
    found = json.loads(mill.command("doctor", job_id, "--json"))["findings"]
    (remedy,) = [each["remedy"] for each in found if each["code"] == "crashed"]
    assert f"`batchmill logs cpu-{pid}`" in remedy
    assert "`batchmill logs supervisor`" in remedy
