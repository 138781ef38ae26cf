"""Cancelling at any moment, twice, and after the end: what is answered stays, the rest ends as cancelled, at once."""

from __future__ import annotations

import json
import random
import time

import pytest

from tests.faults.conftest import SLOW, FaultMill, answers, sqlite_first
from tests.integration.conftest import PATIENCE_SECONDS, until
from tests.support.store.oracle import accepted, changed, export_violations, violations

#: A cancelled job is closed after a turn of its worker and a step of its engine; the rest is for a busy machine.
CLOSED_SECONDS = 5.0
REQUESTS = 600


def check_cancelled(mill: FaultMill, job_id: str) -> int:
    """Every request has its answer or the error `cancelled`: how many have the error."""
    lines = mill.exported(job_id)
    cancelled = {row["index"] for row in map(json.loads, lines) if row["error"]}
    texts = {index: text for index, text in enumerate(answers(REQUESTS)) if index not in cancelled}
    assert export_violations(lines, texts=texts, errors=dict.fromkeys(cancelled, "cancelled")) == []
    return len(cancelled)


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 12))])
def test_a_cancel_at_a_random_moment_and_once_more(seed: int, mill: FaultMill, database_url: str) -> None:
    moment = random.Random(seed)
    slow = mill.ready_worker(**SLOW)
    job_id = mill.submit(REQUESTS, "--batch-size", str(moment.choice([7, 64, 500])))
    time.sleep(moment.uniform(0.0, 1.3))
    before = accepted(mill.store)
    mill.command("cancel", job_id)
    began = time.monotonic()
    mill.command("cancel", job_id)
    until(lambda: mill.store.jobs.job(job_id).closed, "the job is closed", seconds=CLOSED_SECONDS)
    took = time.monotonic() - began
    job = mill.store.jobs.job(job_id)
    assert (job.state, job.counts.pending) == ("cancelled", 0), f"after {took:.1f} s"
    assert changed(before, mill.store) == []
    assert check_cancelled(mill, job_id) == job.counts.cancelled > 0
    assert violations(mill.store) == []
    at_the_end = accepted(mill.store)
    slow.kill()
    mill.ready_worker()
    mill.command("retry", job_id)
    mill.wait(job_id)
    mill.check_ended(job_id, REQUESTS)
    assert changed(at_the_end, mill.store) == []


def test_a_cancel_after_the_end_changes_nothing(mill: FaultMill) -> None:
    mill.ready_worker()
    job_id = mill.submit(REQUESTS)
    mill.wait(job_id)
    before = mill.exported(job_id)
    done = mill.finished("cancel", job_id)
    assert done.returncode == 0
    assert "has ended already: completed" in done.stderr
    assert mill.exported(job_id) == before
    mill.check_ended(job_id, REQUESTS)


@sqlite_first
def test_a_cancel_of_what_nobody_works_on_ends_it_at_once(mill: FaultMill, database_url: str) -> None:
    job_id = mill.submit(REQUESTS)
    mill.command("cancel", job_id)
    assert mill.store.jobs.job(job_id).state == "cancelled"
    assert check_cancelled(mill, job_id) == REQUESTS
    assert violations(mill.store) == []


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_three_cancels_at_once(mill: FaultMill, database_url: str) -> None:
    worker = mill.ready_worker(**SLOW)
    job_id = mill.submit(REQUESTS)
    until(lambda: mill.succeeded(job_id) > 60, "some answers")
    cancels = [mill.start("cancel", job_id) for _ in range(3)]
    assert [each.wait(PATIENCE_SECONDS) for each in cancels] == [0, 0, 0]
    until(lambda: mill.store.jobs.job(job_id).closed, "the job is closed", seconds=CLOSED_SECONDS)
    assert check_cancelled(mill, job_id) > 0
    assert violations(mill.store) == []
    assert worker.poll() is None
