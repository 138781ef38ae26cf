"""The table of `batchmill jobs`: the text of each column, and their alignment."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from click.testing import CliRunner

from batchmill.jobs.models.quantization import Kind, Quantization
from batchmill.jobs.models.spec import ModelSpec
from batchmill.jobs.requests.states import JobState
from batchmill.jobs.store.store import Store
from batchmill.jobs.store.views.jobs import Job
from batchmill.producer.cli.jobs import jobs
from batchmill.producer.cli.text.job_table import table
from tests.support.store import mill


@pytest.fixture
def job(store: Store) -> Job:
    return store.jobs.job(mill.load(store, 4, name="nightly"))


def cells(job: Job, *, now: float) -> list[str]:
    header, row = table([job], notes={}, now=now)
    begins = [header.index(title) for title in header.split()]
    assert all(row[begin - 1] == " " for begin in begins[1:4])
    return [each for each in row.split("  ") if each]


def test_a_job_that_waits_has_an_age_and_no_duration(job: Job) -> None:
    row = [each.strip() for each in cells(job, now=job.queued_at + 200)]
    assert row == [job.id, "queued", "3 min 20 s", "-", "0/4", "0", "echo (none)", "nightly"]


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
    row = [each.strip() for each in cells(ended, now=job.queued_at + 400_000)]
    assert row == [job.id, "completed", "4 d 15 h", "7 s", "3,990/4,000", "10", "echo (none)", "prompts.jsonl"]


def test_a_clock_that_was_set_back_makes_no_negative_time(job: Job) -> None:
    odd = replace(job, started_at=job.queued_at, finished_at=job.queued_at - 5)
    assert [each.strip() for each in cells(odd, now=job.queued_at - 9)][2:4] == ["0 s", "0 s"]


def test_ages_are_by_the_clock_of_the_store(store: Store, job: Job) -> None:
    assert 0 <= store.jobs.now() - job.queued_at < 3_600


class TestNarrow:
    """Parts that a terminal has no room for: the end of a name, the beginning of a model, and then seconds of times."""

    NOTE = "ends in about 9 min 38 s (8 min 31 s to 13 min 18 s)"

    def large(self, job: Job, **changes: Any) -> Job:
        spec = ModelSpec("meta-llama/Llama-3.1-8B-Instruct", None, Quantization(Kind.NF4))
        begun = replace(job, name="nightly-run-of-all-the-prompts", spec=spec, started_at=job.queued_at + 1)
        return replace(begun, **changes)

    def lines(self, job: Job, width: int | None, seconds: float = 80.0) -> list[str]:
        return table([job], notes={job.id: self.NOTE}, now=job.queued_at + seconds, width=width)

    def test_a_pipe_has_everything_in_full(self, job: Job) -> None:
        _, row = self.lines(self.large(job), None)
        assert row.endswith(f"meta-llama/Llama-3.1-8B-Instruct (nf4)  nightly-run-of-all-the-prompts  {self.NOTE}")

    def test_a_wide_terminal_has_it_too(self, job: Job) -> None:
        assert self.lines(self.large(job), 200) == self.lines(self.large(job), None)

    def test_names_are_shortened_first_and_the_note_has_a_line_of_its_own(self, job: Job) -> None:
        header, row, note = self.lines(self.large(job), 115)
        assert len(row) <= 115
        assert row.endswith("  meta-llama/Llama-3.1-8B-Instruct (nf4)  nightly-run-of…")
        assert note == f"  {self.NOTE}"
        assert header.index("NAME") == row.index("nightly")

    def test_then_models_keep_their_end(self, job: Job) -> None:
        _, row, _ = self.lines(self.large(job), 90)
        assert len(row) == 90
        assert "1 min 20 s" in row
        assert row.endswith("  …-Instruct (nf4)  nightly-run…")

    def test_then_times_lose_their_seconds(self, job: Job) -> None:
        _, row, _ = self.lines(self.large(job), 80)
        assert len(row) == 80
        assert "1 min  1 min " in row
        assert row.endswith("  …struct (nf4)  nightly-run…")

    def test_a_million_requests_fit_into_80_columns(self, job: Job) -> None:
        counts = replace(job.counts, total=1_000_000, succeeded=900_000)
        header, row, _ = self.lines(self.large(job, counts=counts), 80, seconds=3_333)
        assert len(row) <= 80, row
        assert len(header) <= 80, header
        assert "900,000/1,000,000" in row
        assert "55 min  55 min" in row
        assert row.endswith("…")

    @pytest.mark.parametrize(
        ("width", "titles"),
        [
            (64, "ID STATE AGE DURATION ANSWERED FAILED MODEL NAME"),
            (63, "ID STATE DURATION ANSWERED FAILED MODEL NAME"),
            (56, "ID STATE ANSWERED FAILED MODEL NAME"),
            (46, "ID STATE ANSWERED FAILED NAME"),
            (39, "ID STATE ANSWERED FAILED"),
            (33, "ID STATE ANSWERED"),
        ],
    )
    def test_then_columns_are_left_out_down_to_id_state_and_progress(self, job: Job, width: int, titles: str) -> None:
        lines = self.lines(self.large(job), width)
        assert lines[0].split() == titles.split()
        assert max(map(len, lines)) <= width, lines
        assert lines[1].startswith(f"{job.id}  queued  ")
        assert " 0/4" in lines[1]
        assert " ".join(" ".join(lines[2:]).split()) == self.NOTE

    def test_what_is_left_out_gives_its_room_to_the_rest(self, job: Job) -> None:
        _, row, *_ = self.lines(self.large(job), 46)
        assert row.endswith("  nightly-r…")

    def test_the_rest_is_never_shortened(self, job: Job) -> None:
        header, row, *_ = self.lines(self.large(job), 20)
        assert header.split() == ["ID", "STATE", "ANSWERED"]
        assert row.split() == [job.id, "queued", "0/4"]


def test_the_command_prints_a_header_and_the_newest_first(
    store_url: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BATCHMILL_DATABASE_URL", store_url)
    assert CliRunner().invoke(jobs, []).stdout == ""
    ids = [mill.load(store, 1, name=name) for name in ("old", "new")]
    header, first, second = CliRunner().invoke(jobs, []).stdout.splitlines()
    assert header.split() == ["ID", "STATE", "AGE", "DURATION", "ANSWERED", "FAILED", "MODEL", "NAME"]
    assert (first.split()[0], second.split()[0]) == (ids[1], ids[0])
