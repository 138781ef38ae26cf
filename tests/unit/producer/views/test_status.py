"""The status of a job: its estimated end, in the same words in every command."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from click.testing import CliRunner

from batchmill.jobs.configuration.settings import load_settings
from batchmill.jobs.requests.generation import GenerationOptions, SamplingParams
from batchmill.jobs.requests.request import ErrorCode
from batchmill.jobs.store.leases.lease import BatchReport, WorkerSession
from batchmill.jobs.store.store import Store
from batchmill.producer.cli.jobs import COMMANDS
from batchmill.producer.cli.text.job_lines import job_lines
from batchmill.producer.views.public_json import status_json
from batchmill.producer.views.status import JobStatus
from tests.support.store import mill


@pytest.fixture
def store(clocked: Store) -> Store:
    return clocked


def test_refused_prompts_are_no_throughput(store: Store, clock: mill.Clock) -> None:
    job_id = mill.load(store, 4)
    who = mill.session(store)
    (claimed,) = mill.claim(store, who)
    clock.seconds += 2
    outputs = [mill.output(job_id, index, error=ErrorCode.EMPTY_PROMPT if index else None) for index in range(3)]
    mill.save(store, who, [BatchReport(claimed.lease, outputs=outputs, in_flight=(3,))])
    status = JobStatus.read(store, job_id)
    assert status.job.counts.prompt_tokens == 6
    assert status.prompt_tokens_per_second == pytest.approx(1.0)


class TestEnd:
    """The estimated end of a job, in the same words in every command."""

    @pytest.fixture
    def who(self, store: Store) -> WorkerSession:
        """A worker of eight rows, and a job of 400 requests, which are answered with three tokens each."""
        mill.load(store, 400, batch_size=40, options=GenerationOptions(None, SamplingParams(max_tokens=4)))
        return mill.session(store)

    def work(self, store: Store, who: WorkerSession, clock: mill.Clock, *, batches: int) -> None:
        """Answers four requests a second; of another batch the first half, so that it is held on."""
        for place in range(batches + 1):
            (claimed,) = mill.claim(store, who)
            clock.seconds += 10 if place < batches else 5
            store.registration.heartbeat(who.worker_id, beat=5.0)
            mill.save(store, who, [mill.answered(claimed, count=None if place < batches else 20)])

    def read(self, store: Store) -> JobStatus:
        return JobStatus.read(store, store.jobs.find("last"))

    def test_it_is_measured_then_known_and_nothing_once_no_worker_lives(
        self, store: Store, who: WorkerSession, clock: mill.Clock
    ) -> None:
        assert self.read(store).ends_in == ""
        (claimed,) = mill.claim(store, who)
        assert self.read(store).ends_in == "measuring"
        assert "  ends in    measuring" in job_lines(self.read(store))
        mill.save(store, who, [replace(mill.answered(claimed, count=0), release=True)])
        self.work(store, who, clock, batches=4)
        status = self.read(store)
        assert status.estimate is not None
        assert status.estimate.seconds == pytest.approx(220 / 4, rel=0.1)
        said = status_json(status)
        assert said["eta_low_seconds"] <= said["eta_seconds"] <= said["eta_high_seconds"]
        assert f"  ends in    {status.ends_in}" in job_lines(status)
        clock.seconds += 3_600
        gone = self.read(store)
        assert (gone.estimate, gone.ends_in, status_json(gone)["eta_seconds"]) == (None, "", None)
        assert gone.rate == pytest.approx(180 / 50), "and the hour in which nobody lived is no work"

    def test_status_wait_and_jobs_say_the_same(
        self, store: Store, who: WorkerSession, clock: mill.Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.work(store, who, clock, batches=4)
        monkeypatch.setattr("batchmill.producer.cli.jobs._open", lambda: (load_settings(), store))
        run = CliRunner().invoke
        listed, status = run(COMMANDS[1], []), run(COMMANDS[0], [])
        waited = run(COMMANDS[3], ["--timeout", "0"])
        ends = self.read(store).ends_in
        assert ends.startswith("about ")
        assert f"  ends in    {ends}" in status.stdout.splitlines()
        assert listed.stdout.rstrip().endswith(f"  ends in {ends}")
        assert f"ends in {ends}" in waited.stderr
        in_json = json.loads(run(COMMANDS[1], ["--json"]).stdout)[0]
        assert in_json["eta_seconds"] == json.loads(run(COMMANDS[0], ["--json"]).stdout)["eta_seconds"]

    def test_a_job_that_is_cancelled_or_over_says_nothing(
        self, store: Store, who: WorkerSession, clock: mill.Clock
    ) -> None:
        self.work(store, who, clock, batches=4)
        store.closing.cancel(store.jobs.find("last"))
        assert self.read(store).ends_in == ""
