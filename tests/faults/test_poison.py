"""Bad prompts and broken devices: one poison prompt ends as one error, everybody else is answered."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import psutil
import pytest

from batchmill.jobs.models.spec import ModelSpec
from batchmill.jobs.requests.request import ErrorCode
from batchmill.jobs.requests.states import WorkerState
from tests.integration.conftest import PATIENCE_SECONDS, Mill, child_of, until
from tests.support.store.oracle import violations

CHAOS = {"chaos": True, "engine_rows": 64}


def write(path: Path, count: int, magic: dict[int, str]) -> Path:
    lines = (json.dumps({"prompt": magic.get(index, f"one two {index}")}) for index in range(count))
    path.write_text("\n".join(lines) + "\n")
    return path


def crashes(mill: Mill) -> int:
    """Counts the child processes that died with requests in flight."""
    from sqlalchemy import func, select

    from batchmill.jobs.store.tables import runs

    with mill.store.database.read() as connection:
        each = select(runs.c.worker_id, runs.c.worker_generation).where(runs.c.outcome == "crashed").distinct()
        return connection.scalar(select(func.count()).select_from(each.subquery())) or 0


def check(mill: Mill, job_id: str, count: int, expected: dict[int, str]) -> None:
    """Every innocent request has its answer, and each of the others its error."""
    lines = mill.results(job_id)
    assert [line["index"] for line in lines] == list(range(count))
    assert {line["index"]: line["error"]["code"] for line in lines if line["error"]} == expected
    assert all(
        line["text"] == f"one two {line['index']}" for line in lines if not line["error"] and line["text"][0] != "!"
    )
    assert violations(mill.store) == []


@pytest.mark.parametrize("magic", ["!kill9", "!sticky"])
def test_one_poison_prompt_ends_as_one_error_after_five_crashes(mill: Mill, tmp_path: Path, magic: str) -> None:
    mill.start("worker", "-m", "echo", **CHAOS)
    job_id = mill.command("submit", write(tmp_path / "p.jsonl", 200, {70: magic}), "-m", "echo").strip()
    mill.command("wait", job_id, "--timeout", "300", code=5)
    check(mill, job_id, 200, {70: ErrorCode.POISON})
    assert crashes(mill) <= 5


def test_a_prompt_that_hangs_is_found_by_the_watchdog(mill: Mill, tmp_path: Path) -> None:
    mill.start("worker", "-m", "echo", stall_seconds=1.0, **CHAOS)
    job_id = mill.command("submit", write(tmp_path / "p.jsonl", 40, {7: "!hang", 8: "!slow"}), "-m", "echo").strip()
    mill.command("wait", job_id, "--timeout", "300", code=5)
    check(mill, job_id, 40, {7: ErrorCode.POISON})
    assert crashes(mill) == 5


def test_three_poison_prompts_among_a_thousand_and_other_jobs_go_on(mill: Mill, tmp_path: Path) -> None:
    for name in ("a", "b"):
        mill.start("worker", "-m", "echo", "--name", name, **CHAOS)
    magic = {3: "!kill9", 5: "!segv", 777: "!kill9"}
    bad = mill.command("submit", write(tmp_path / "bad.jsonl", 1_000, magic), "-m", "echo").strip()
    good = mill.command("submit", write(tmp_path / "good.jsonl", 300, {}), "-m", "echo").strip()
    mill.command("wait", good, "--timeout", "300")
    mill.command("wait", bad, "--timeout", "300", code=5)
    check(mill, bad, 1_000, dict.fromkeys(magic, ErrorCode.POISON))
    check(mill, good, 300, {})
    assert crashes(mill) <= 15


def test_memory_that_runs_out_fails_nobody_but_who_needs_too_much_alone(mill: Mill, tmp_path: Path) -> None:
    mill.start("worker", "-m", "echo", **CHAOS)
    magic = {3: "!oom>17", 9: "!oom>1", 50: "!oom>0"}
    job_id = mill.command("submit", write(tmp_path / "p.jsonl", 200, magic), "-m", "echo").strip()
    mill.command("wait", job_id, "--timeout", "300", code=5)
    check(mill, job_id, 200, {50: ErrorCode.OUT_OF_MEMORY})
    assert crashes(mill) == 0
    device = f"{os.uname().nodename}/cpu/auto"
    until(lambda: mill.store.health.known_capacity(ModelSpec.parse("echo"), device), "the size is remembered")


def test_without_chaos_magic_prompts_are_ordinary_text(mill: Mill, tmp_path: Path) -> None:
    mill.start("worker", "-m", "echo")
    magic = {0: "!kill9", 1: "!segv", 2: "!oom>0", 3: "!hang", 4: "!sticky", 5: "!slow"}
    job_id = mill.command("submit", write(tmp_path / "p.jsonl", 8, magic), "-m", "echo", "--wait").strip()
    assert [line["text"] for line in mill.results(job_id)][:6] == list(magic.values())


def test_a_worker_whose_device_breaks_gives_up_and_takes_no_prompt_with_it(mill: Mill, tmp_path: Path) -> None:
    # Slow, so that the job outlasts three starts of the broken worker's child on a busy machine.
    pace = {"echo_step_seconds": 1.0, "engine_rows": 8}
    broken = mill.start("worker", "-m", "echo", "--name", "broken", "--device", "cpu", **pace)
    mill.start("worker", "-m", "echo", "--name", "good", **pace)
    until(lambda: len(mill.store.workers.rows()) == 2, "two workers")
    job_id = mill.command("submit", write(tmp_path / "p.jsonl", 400, {}), "-m", "echo", "--batch-size", "8").strip()

    def row() -> object:
        return next(each for each in mill.store.workers.rows(only_alive=False) if each.name == "broken")

    killed: set[int] = set()

    def is_sick() -> bool:
        """Ends the broken worker's process as soon as it holds something, as its device would."""
        now = row()
        if now.state is WorkerState.READY and now.leases and now.generation not in killed:
            killed.add(now.generation)
            os.kill(child_of(broken), signal.SIGKILL)
        return now.state is WorkerState.SICK

    until(is_sick, "the worker says that it is sick")
    mill.start("worker", "-m", "echo", "--name", "quick")
    assert broken.wait(PATIENCE_SECONDS) == 1
    assert "look at the device" in row().error
    mill.command("wait", job_id, "--timeout", "300")
    check(mill, job_id, 400, {})
    assert not psutil.pid_exists(broken.pid) or broken.poll() is not None
