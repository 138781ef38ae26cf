"""The table of `batchmill jobs`: what each column says, and that they stand below one another."""

from __future__ import annotations

from dataclasses import replace

import pytest
from click.testing import CliRunner

from jobs.states import JobState
from jobs.store import Store
from jobs.store.reading import Job
from producer.cli_jobs import jobs
from producer.job_table import table
from tests import mill


@pytest.fixture
def job(store: Store) -> Job:
    return store.reading.job(mill.load(store, 4, name="nightly"))


def cells(job: Job, *, now: float) -> list[str]:
    header, row = table([job], ends={}, now=now)
    begins = [header.index(title) for title in header.split()]
    assert all(row[begin - 1] == " " for begin in begins[1:4])
    return [each for each in row.split("  ") if each]


def test_a_job_that_waits_has_an_age_and_no_duration(job: Job) -> None:
    found = [each.strip() for each in cells(job, now=job.queued_at + 200)]
    assert found == [job.id, "queued", "3 min 20 s", "-", "0/4", "0", "echo (none)", "nightly"]


def test_a_job_that_runs_has_run_since_its_first_batch(job: Job) -> None:
    running = replace(job, state=JobState.RUNNING, started_at=job.queued_at + 150)
    assert "50 s" in cells(running, now=job.queued_at + 200)[3]


def test_a_job_that_has_ended_took_what_it_took(job: Job) -> None:
    counts = replace(job.counts, total=4_000, succeeded=3_990, failed=10)
    ended = replace(
        job,
        state=JobState.COMPLETED,
        counts=counts,
        started_at=job.queued_at + 1,
        finished_at=job.queued_at + 8,
        name=None,
    )
    found = [each.strip() for each in cells(ended, now=job.queued_at + 400_000)]
    assert found == [job.id, "completed", "4 d 15 h", "7 s", "3,990/4,000", "10", "echo (none)", "prompts.jsonl"]


def test_a_clock_that_was_set_back_makes_no_negative_time(job: Job) -> None:
    odd = replace(job, started_at=job.queued_at, finished_at=job.queued_at - 5)
    assert [each.strip() for each in cells(odd, now=job.queued_at - 9)][2:4] == ["0 s", "0 s"]


def test_ages_are_by_the_clock_of_the_store(store: Store, job: Job) -> None:
    assert 0 <= store.reading.now() - job.queued_at < 3_600


def test_the_command_prints_a_header_and_the_newest_first(
    store_url: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BATCHMILL_DATABASE_URL", store_url)
    assert CliRunner().invoke(jobs, []).stdout == ""
    ids = [mill.load(store, 1, name=name) for name in ("old", "new")]
    header, first, second = CliRunner().invoke(jobs, []).stdout.splitlines()
    assert header.split() == ["ID", "STATE", "AGE", "DURATION", "ANSWERED", "FAILED", "MODEL", "NAME"]
    assert (first.split()[0], second.split()[0]) == (ids[1], ids[0])
