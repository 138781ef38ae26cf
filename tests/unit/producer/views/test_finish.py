"""Finish reasons of answers: counted as they are saved, and shown in every summary of a job."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner, Result
from sqlalchemy import text

from batchmill.jobs.configuration.settings import load_settings
from batchmill.jobs.errors import NotAllSucceeded
from batchmill.jobs.requests.generation import Choice, GenerationOptions, SamplingParams
from batchmill.jobs.requests.request import ErrorCode, Output, RequestKey
from batchmill.jobs.requests.states import JobState
from batchmill.jobs.store.leases.lease import BatchReport, Claimed, WorkerSession
from batchmill.jobs.store.store import Store
from batchmill.jobs.store.views.jobs import FinishReasons
from batchmill.migrations.revisions import open_store
from batchmill.producer.cli import jobs
from batchmill.producer.cli.progress import require_success
from batchmill.producer.cli.text.job_lines import job_lines
from batchmill.producer.views.finish import answered_line, finish_line
from batchmill.producer.views.public_json import job_json
from batchmill.producer.views.status import JobStatus
from tests.support.store import mill

RAISE = "raise --max-tokens, or that of the lines"


def ended(claimed: Claimed, *reasons: str) -> BatchReport:
    """The batch's first requests answered, each by choices that ended so: `"stop length"` is two."""
    outputs = [
        Output(RequestKey(claimed.lease.job_id, each.index), tuple(Choice("x", word) for word in words.split()), 2, 3)
        for each, words in zip(claimed.requests, reasons, strict=False)
    ]
    return BatchReport(claimed.lease, outputs=outputs)


def answer(store: Store, who: WorkerSession, *reasons: str) -> None:
    (claimed,) = mill.claim(store, who)
    mill.save(store, who, [ended(claimed, *reasons)])


def reasons(store: Store, job_id: str) -> FinishReasons | None:
    return store.jobs.job(job_id).counts.finish_reasons


def test_each_choice_of_an_answer_counts(store: Store) -> None:
    job_id = mill.load(store, 4)
    answer(store, mill.session(store), "stop", "length", "stop length length", "stop")
    assert reasons(store, job_id) == FinishReasons(stop=3, length=3)


def test_an_answer_that_is_saved_twice_counts_once(store: Store) -> None:
    job_id = mill.load(store, 4)
    who = mill.session(store)
    (claimed,) = mill.claim(store, who)
    mill.save(store, who, [ended(claimed, "length")])
    mill.save(store, who, [ended(claimed, "length", "stop")])
    assert reasons(store, job_id) == FinishReasons(stop=1, length=1)


def test_errors_have_no_finish_reason_and_a_retry_adds_its_own(store: Store) -> None:
    job_id = mill.load(store, 4)
    who = mill.session(store)
    (claimed,) = mill.claim(store, who)
    errors = [mill.output(job_id, index, error=ErrorCode.ENGINE_ERROR) for index in (2, 3)]
    mill.save(store, who, [BatchReport(claimed.lease, outputs=[*ended(claimed, "stop", "length").outputs, *errors])])
    assert reasons(store, job_id) == FinishReasons(stop=1, length=1)
    store.retries.retry(job_id)
    answer(store, who, "length", "length")
    assert reasons(store, job_id) == FinishReasons(stop=1, length=3)


def test_a_job_with_answers_that_nobody_counted_says_nothing(store: Store) -> None:
    job_id = mill.load(store, 8)
    who = mill.session(store)
    answer(store, who, "stop", "stop", "stop", "stop")
    with store.database.write() as connection:
        connection.execute(text("UPDATE batches SET stop_choices = NULL, length_choices = NULL"))
    answer(store, who, "length", "length", "length", "length")
    job = store.jobs.job(job_id)
    assert (job.counts.finish_reasons, finish_line(job), job_json(job)["finish_reasons"]) == (None, None, None)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (["stop"], "1 stop"),
        (["stop", "length", "length length"], f"1 stop, 3 length (75 %): {RAISE}"),
        (
            ["stop " * 127, "stop " * 127, "length"],
            f"254 stop, 1 length (under 1 %): {RAISE}",
        ),
    ],
)
def test_the_line_names_the_share_that_was_cut_short_and_the_remedy(store: Store, given: list[str], line: str) -> None:
    job_id = mill.load(store, 4)
    answer(store, mill.session(store), *given)
    assert finish_line(store.jobs.job(job_id)) == line
    assert f"  finished   {line}" in job_lines(JobStatus.read(store, job_id))


def test_a_job_without_answers_has_no_line(store: Store) -> None:
    assert finish_line(store.jobs.job(mill.load(store, 4))) is None


def test_answers_that_were_to_be_as_long_as_they_may_need_no_remedy(store: Store) -> None:
    job_id = mill.load(store, 4, options=GenerationOptions(sampling=SamplingParams(ignore_eos=True)))
    answer(store, mill.session(store), "length")
    assert finish_line(store.jobs.job(job_id)) == "0 stop, 1 length (100 %)"


def test_a_cancelled_job_says_how_many_were_answered(store: Store) -> None:
    job_id = mill.load(store, 10)
    who = mill.session(store)
    answer(store, who, "stop", "stop", "stop", "stop")
    answer(store, who)
    assert store.closing.cancel(job_id) is JobState.CANCELLING
    store.recovery.take_back(who.worker_id, generation=who.generation)
    store.closing.close_finished()
    status = JobStatus.read(store, job_id)
    assert answered_line(status.job) == "4 of 10 requests were answered"
    assert job_lines(status)[0] == f"job {job_id}: cancelled, 4 of 10 requests were answered"
    with pytest.raises(
        NotAllSucceeded, match="is cancelled: 4 of 10 requests were answered, 0 failed, 6 were cancelled"
    ):
        require_success(status)


def invoke(*words: str) -> Result:
    commands = {str(each.name): each for each in jobs.COMMANDS}
    return CliRunner().invoke(commands[words[0]], words[1:])


def test_the_commands_say_both() -> None:
    store = open_store(load_settings())
    job_id = mill.load(store, 5)
    answer(store, mill.session(store), "stop", "stop", "length", "stop")
    shown = invoke("cancel", job_id)
    assert shown.stderr == f"job {job_id} is cancelled: 4 of 5 requests were answered\n"
    again = invoke("cancel", job_id)
    assert again.stderr == f"job {job_id} has ended already: cancelled, 4 of 5 requests were answered\n"
    waited = invoke("wait", job_id, "--json")
    assert f"{job_id} finished: 3 stop, 1 length (25 %): {RAISE}" in waited.stderr
    assert json.loads(waited.stdout)["finish_reasons"] == {"stop": 3, "length": 1}
    store.close()
