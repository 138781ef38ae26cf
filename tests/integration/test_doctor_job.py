"""`batchmill doctor JOB` as a user runs it, beside real workers and a real Redis."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from batchmill.jobs.models.spec import ModelSpec
from tests.integration.conftest import Mill, until, write_prompts

ECHO = ModelSpec.parse("echo")


def doctor(mill: Mill, *, code: int, job: str = "last") -> dict[str, Any]:
    said: dict[str, Any] = json.loads(mill.command("doctor", job, "--json", code=code))
    return said


def test_without_a_worker_it_names_the_command_that_starts_one(mill: Mill, tmp_path: Path) -> None:
    mill.command("doctor", "last", code=3)
    job_id = mill.command("submit", write_prompts(tmp_path / "p.jsonl", 30), "-m", "echo").strip()
    said = doctor(mill, code=1)
    assert (said["job"], said["state"], said["verdict"]) == (job_id, "queued", "stuck")
    assert said["findings"][0]["code"] == "no_worker"
    assert said["findings"][0]["remedy"] == "start one: batchmill up -m echo"
    lines = mill.command("doctor", job_id[:5], code=1).splitlines()
    assert lines[0].startswith(f"job {job_id} is stuck: no live worker serves echo (none)")
    assert "one two three" not in "".join(lines)

    mill.start("worker", "-m", "echo")
    mill.command("wait", job_id)
    assert doctor(mill, code=0, job=job_id)["verdict"] == "closed"


def test_without_redis_an_idle_worker_is_told_of_and_redis_wakes_it_up(mill: Mill, tmp_path: Path) -> None:
    mill.start("worker", "-m", "echo", "--name", "idle", reconcile_seconds=3_600)
    until(lambda: any(each.state == "ready" for each in mill.store.workers.rows(spec=ECHO)), "the worker is ready")
    mill.redis.stop()
    job_id = mill.command("submit", write_prompts(tmp_path / "p.jsonl", 30), "-m", "echo").strip()
    said = doctor(mill, code=0)
    assert (said["verdict"], said["findings"][0]["code"]) == ("waiting", "redis_away")
    assert "worker idle on " in said["findings"][0]["message"]
    assert "batchmill up" in said["findings"][0]["remedy"]
    mill.redis.start()
    mill.start("worker", "-m", "echo", "--name", "reconciles")
    mill.command("wait", job_id, "--timeout", "300")
