"""Several stores on one Redis: none keeps another's workers waiting, and two that show one id are told apart."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from batchmill.jobs.broker.queue_name import old_queue_name
from batchmill.jobs.configuration.settings import load_settings
from batchmill.jobs.models.spec import ModelSpec
from batchmill.jobs.requests.states import JobState, WorkerState
from batchmill.migrations import revisions
from tests.integration.conftest import TIMERS, Mill, until, write_prompts

ECHO = ModelSpec.parse("echo")
SLOW = {"echo_step_seconds": 0.3, "engine_rows": 2}


def beside(mill: Mill, home: Path, **timers: float) -> Mill:
    """Another home and store, on the Redis of this mill."""
    settings = load_settings(home=home, broker_url=mill.settings.broker, **(TIMERS | timers))
    revisions.open_store(settings).close()
    return Mill(home, settings)


@pytest.fixture
def other(mill: Mill, tmp_path: Path) -> Iterator[Mill]:
    """Its workers find work by wake-ups alone: they look for more after an hour."""
    other = beside(mill, tmp_path / "other", reconcile_seconds=3_600.0)
    yield other
    other.end()


def test_the_job_of_one_store_is_not_kept_waiting_by_the_wake_ups_of_another(
    mill: Mill, other: Mill, tmp_path: Path
) -> None:
    other.start("worker", "-m", "echo")
    until(lambda: [each.state for each in other.store.workers.rows()] == [WorkerState.READY], "a worker is ready")
    long = mill.command("submit", write_prompts(tmp_path / "l.jsonl", 400), "-m", "echo", "--batch-size", "1").strip()
    assert mill.queue_length(mill.echo_queue) == 400
    job_id = other.command("submit", write_prompts(tmp_path / "p.jsonl", 10), "-m", "echo", "--wait").strip()
    assert other.store.jobs.job(job_id).state is JobState.COMPLETED
    assert mill.queue_length(mill.echo_queue) == 400, "whose worker took none of the other's wake-ups"
    assert mill.store.jobs.job(long).state is JobState.QUEUED


def test_a_worker_deletes_the_queue_that_stores_once_shared(mill: Mill) -> None:
    with redis.Redis(unix_socket_path=str(mill.settings.redis_socket)) as client:
        client.lpush(f"batchmill:{old_queue_name(ECHO)}", b"{}")
        mill.start("worker", "-m", "echo")
        until(lambda: not client.exists(f"batchmill:{old_queue_name(ECHO)}"), "the old queue is deleted")


def own_id(mill: Mill) -> dict[str, Any] | None:
    """The check of doctor about the store's id, if there is one."""
    said = json.loads(mill.finished("doctor", "--json").stdout)
    return next((each for each in said if each["name"] == "store id"), None)


def test_two_live_stores_of_one_id_are_told_and_the_copy_gets_its_own(mill: Mill, tmp_path: Path) -> None:
    home = tmp_path / "copy"
    home.mkdir()
    shutil.copy(mill.settings.database_file, home / "batchmill.db")
    copy = beside(mill, home)
    assert copy.store.id == mill.store.id
    mill.start("worker", "-m", "echo", "--name", "first")
    worker = copy.start("worker", "-m", "echo", "--name", "second")
    until(lambda: mill.store.workers.namesakes() and copy.store.workers.namesakes(), "both have met the other")
    found = own_id(mill)
    assert found is not None
    assert re.search(r"another live store has the same id: second on .* works for it", found["found"])
    assert "batchmill db new-id" in found["fix"]
    assert "worker second on" in copy.finished("db", "new-id").stderr
    worker.terminate()
    worker.communicate(timeout=30)
    assert copy.finished("db", "new-id").returncode == 0
    copy.end()
    renewed = Mill(home, copy.settings)
    assert renewed.store.id != mill.store.id
    renewed.start("worker", "-m", "echo", "--name", "third")
    until(lambda: own_id(mill) is None, "nobody shows its id any more")
    job_id = renewed.command("submit", write_prompts(tmp_path / "p.jsonl", 5), "-m", "echo", "--wait").strip()
    assert renewed.store.jobs.job(job_id).state is JobState.COMPLETED
    assert renewed.store.workers.namesakes() == []
    renewed.end()
