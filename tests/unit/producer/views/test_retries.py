"""Errors that a retry can resolve: the table, and the requests that a retry reopens or leaves."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace

import pytest
from sqlalchemy import select

from batchmill.jobs.errors import JobStateError
from batchmill.jobs.requests.causes import CAUSES, Cause, Chances, cause_of
from batchmill.jobs.requests.request import ErrorCode
from batchmill.jobs.requests.states import BatchState, JobState, WorkerState
from batchmill.jobs.store.jobs import retry
from batchmill.jobs.store.leases.lease import BatchReport
from batchmill.jobs.store.store import Store
from batchmill.jobs.store.tables import batches, jobs
from batchmill.producer.views.retries import chances_of, retry_advice, retry_lines
from batchmill.producer.views.status import JobStatus
from tests.support.store import mill

#: None: answered.
Ends = Mapping[int, ErrorCode | None]


def ended(store: Store, ends: Ends, *, tokens: int = 2, identity: str = mill.IDENTITY, batch_size: int = 4) -> str:
    """A job whose requests ended so, with prompts of so many tokens."""
    job_id = mill.load(store, len(ends), batch_size=batch_size)
    who = mill.session(store, identity=identity)
    while taken := mill.claim(store, who, wanted=len(ends), room=10_000):
        held = []
        for each in taken:
            made = [mill.output(job_id, one.index, error=ends[one.index]) for one in each.requests]
            held.append(BatchReport(each.lease, outputs=[replace(one, prompt_tokens=tokens) for one in made]))
        mill.save(store, who, held)
    assert store.jobs.job(job_id).closed
    return job_id


def pending(store: Store) -> list[int]:
    who, found = mill.session(store, name="another"), []
    while taken := mill.claim(store, who, wanted=99, room=999):
        found += [one.index for each in taken for one in each.requests]
    return sorted(found)


def some(*, context: float = 0, keeps_model: bool = True) -> Chances:
    return Chances(context, keeps_model=keeps_model, everything=False)


def test_every_error_is_in_the_table_and_has_a_cause() -> None:
    assert set(CAUSES) == set(ErrorCode)
    assert {cause_of(each.value) for each in ErrorCode} == set(Cause)
    assert cause_of("a_code_of_a_newer_batchmill") is Cause.AROUND


def test_only_what_another_try_can_end_otherwise_is_moved(store: Store) -> None:
    codes = [each for each in ErrorCode if each is not ErrorCode.CANCELLED]  # no worker answers so
    job_id = ended(store, dict(enumerate([None, *codes])))
    retried = store.retries.retry(job_id, some())
    moved = [index for index, code in enumerate(codes, 1) if CAUSES[code] is Cause.AROUND]
    assert retried.moved == len(moved)
    assert retried.is_whole
    assert {code: each.indexes for code, each in retried.left.items()} == {
        code.value: [index] for index, code in enumerate(codes, 1) if CAUSES[code] is not Cause.AROUND
    }
    assert pending(store) == moved
    counts = store.jobs.job(job_id).counts
    assert (counts.total, counts.succeeded, counts.pending) == (len(codes) + 1, 1, len(moved))


def test_a_job_of_which_nothing_is_moved_stays_closed_until_all_of_it_is_asked_for(store: Store) -> None:
    job_id = ended(store, {0: None, 1: ErrorCode.INVALID_RESPONSE_FORMAT, 2: ErrorCode.EMPTY_PROMPT})
    before = store.jobs.job(job_id)
    retried = store.retries.retry(job_id, some())
    assert (retried.moved, set(retried.left)) == (0, {"invalid_response_format", "empty_prompt"})
    assert store.jobs.job(job_id) == before
    assert store.retries.retry(job_id).moved == 2
    assert store.jobs.job(job_id).state is JobState.QUEUED
    assert pending(store) == [1, 2]


def test_whole_batches_are_made_of_what_lies_far_apart(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "PAGE_REQUESTS", 8)
    monkeypatch.setattr(retry, "_LOOK_REQUESTS", 5)
    ends = {index: ErrorCode.POISON if index % 3 == 0 else ErrorCode.EMPTY_PROMPT for index in range(60)}
    job_id = ended(store, ends)
    retried = store.retries.retry(job_id, some())
    assert (retried.moved, retried.left["empty_prompt"].count) == (20, 40)
    assert retried.left["empty_prompt"].indexes == [1, 2, 4]
    with store.database.read() as connection:
        made = select(batches.c.total).where(batches.c.state == BatchState.PENDING.value)
        assert list(connection.scalars(made)) == [4] * 5


def test_a_retry_cut_short_keeps_its_mark_and_the_next_one_goes_on(store: Store) -> None:
    job_id = ended(store, {index: (ErrorCode.EMPTY_PROMPT, ErrorCode.POISON)[index % 2] for index in range(8)})
    store.retries._begin_retry(job_id)
    assert store.retries._retry_page(job_id, [1, 3]) == (2, [])
    assert store.retries.retry(job_id, some()).moved == 2
    with store.database.read() as connection:
        assert connection.scalar(select(jobs.c.retry_started_at)) is None
    assert pending(store) == [1, 3, 5, 7]


def test_a_cancel_in_between_is_told_of(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "PAGE_REQUESTS", 4)
    job_id = ended(store, dict.fromkeys(range(12), ErrorCode.POISON))
    move = store.retries._retry_page

    def cancelled_after(job_id: str, indexes: list[int], *, keeps_model: bool = True) -> tuple[int, list[int]]:
        done = move(job_id, indexes, keeps_model=keeps_model)
        store.closing.cancel(job_id)
        return done

    monkeypatch.setattr(store.retries, "_retry_page", cancelled_after)
    retried = store.retries.retry(job_id, some())
    assert (retried.moved, retried.is_whole) == (4, False)
    assert store.jobs.job(job_id).counts.pending == 0


@pytest.mark.parametrize(("context", "moved"), [(700, 0), (701, 3)])
def test_a_prompt_that_was_too_long_runs_where_the_context_takes_it(store: Store, context: int, moved: int) -> None:
    job_id = ended(store, dict.fromkeys(range(3), ErrorCode.CONTEXT_LENGTH_EXCEEDED), tokens=700)
    retried = store.retries.retry(job_id, some(context=context))
    assert retried.moved == moved
    if not moved:
        assert retried.left["context_length_exceeded"].shortest_tokens == 700


class TestTheModelOfAJob:
    def test_without_any_answer_it_is_that_of_the_next_worker(self, store: Store) -> None:
        job_id = ended(store, {0: ErrorCode.NO_CHAT_TEMPLATE, 1: ErrorCode.POISON}, identity="template=1")
        chances = chances_of(store.jobs.job(job_id), everything=False, store=store)
        assert not chances.keeps_model
        assert store.retries.retry(job_id, chances).moved == 2
        assert store.jobs.job(job_id).identity is None
        assert mill.claim(store, mill.session(store, name="mended", identity="template=2"))
        assert store.jobs.job(job_id).identity == "template=2"

    def test_with_an_answer_it_is_kept_and_what_it_decides_is_left(self, store: Store) -> None:
        ends = {0: None, 1: ErrorCode.NO_CHAT_TEMPLATE, 2: ErrorCode.POISON}
        job_id = ended(store, ends, identity="template=1")
        chances = chances_of(store.jobs.job(job_id), everything=False, store=store)
        assert store.retries.retry(job_id, chances).left.keys() == {"no_chat_template"}
        assert store.jobs.job(job_id).identity == "template=1"

    def test_an_answer_that_came_meanwhile_keeps_it(self, store: Store) -> None:
        job_id = ended(store, {0: None, 1: ErrorCode.POISON}, identity="template=1")
        store.retries.retry(job_id, some(keeps_model=False))
        assert store.jobs.job(job_id).identity == "template=1"

    def test_a_context_counts_of_live_workers_that_may_take_the_job(self, store: Store) -> None:
        job_id = ended(store, {0: None, 1: ErrorCode.CONTEXT_LENGTH_EXCEEDED}, identity="weights=7")
        job = store.jobs.job(job_id)
        assert chances_of(job, everything=False, store=store).context_tokens == 128
        with store.database.write() as connection:
            connection.exec_driver_sql("UPDATE workers SET alive_until = 0")
        mill.session(store, name="of another model", identity="weights=8")
        mill.session(store, name="of another job", identity="weights=7", only_job="another")
        mill.session(store, name="not ready", identity="weights=7", ready=False)
        assert chances_of(job, everything=False, store=store).context_tokens == 0


class TestOpenJobs:
    def test_one_that_nobody_serves_names_what_makes_it_go_on(self, store: Store) -> None:
        job_id = mill.load(store, 3)
        with pytest.raises(JobStateError) as refused:
            chances_of(store.jobs.job(job_id), everything=False, store=store)
        assert str(refused.value) == (
            f"job {job_id} is queued: retry it once it has ended; no worker serves echo (none) yet;"
            " start one: batchmill up -m echo"
        )

    def test_what_failed_of_it_can_be_retried_after_a_cancel(self, store: Store) -> None:
        job_id = mill.load(store, 8)
        who = mill.session(store)
        (claimed,) = mill.claim(store, who)
        mill.save(store, who, [mill.answered(claimed, error=ErrorCode.POISON)])
        store.registration.enter(who.worker_id, WorkerState.STOPPED)
        with pytest.raises(JobStateError, match=f"ended, or at once after `batchmill cancel {job_id}`; no live worker"):
            chances_of(store.jobs.job(job_id), everything=False, store=store)
        store.closing.cancel(job_id)
        chances = chances_of(store.jobs.job(job_id), everything=False, store=store)
        assert store.retries.retry(job_id, chances).moved == 8

    def test_one_that_somebody_serves_is_to_be_waited_for(self, store: Store) -> None:
        job_id = mill.load(store, 3)
        mill.session(store)
        chances = chances_of(store.jobs.job(job_id), everything=False, store=store)
        with pytest.raises(JobStateError, match=f"wait until it has ended .`batchmill wait {job_id}`"):
            store.retries.retry(job_id, chances)

    def test_a_retry_of_it_that_was_cut_short_goes_on(self, store: Store) -> None:
        job_id = ended(store, dict.fromkeys(range(4), ErrorCode.POISON))
        store.retries._begin_retry(job_id)
        store.retries._retry_page(job_id, [0, 1])
        with store.database.write() as connection:
            connection.exec_driver_sql("UPDATE workers SET alive_until = 0")
        chances = chances_of(store.jobs.job(job_id), everything=False, store=store)
        assert store.retries.retry(job_id, chances).moved == 2


class TestAdvice:
    def test_a_retry_is_advised_where_it_would_move_something(self, store: Store) -> None:
        job_id = ended(store, {0: None, 1: ErrorCode.EMPTY_PROMPT, 2: ErrorCode.POISON})
        advice = retry_advice(store.jobs.job(job_id), store)
        assert advice == f"`batchmill retry {job_id}` runs those that may succeed now"

    def test_else_the_reasons_are_named_and_what_there_is_to_do(self, store: Store) -> None:
        ends = {0: None, 1: ErrorCode.EMPTY_PROMPT, 2: ErrorCode.CONTEXT_LENGTH_EXCEEDED, 3: ErrorCode.EMPTY_PROMPT}
        job_id = ended(store, ends, tokens=700)
        assert store.retries.retry(job_id, some(context=128)).moved == 0
        assert retry_advice(store.jobs.job(job_id), store) == (
            "a retry would skip them (1 context_length_exceeded: the shortest of these prompts has 700 tokens, and no"
            " live worker takes more than 128 with the answer; a larger --context helps if the model supports it;"
            f" 2 empty_prompt: its line alone decides that); `batchmill retry {job_id} --all` runs these too; submit"
            " corrected lines as a new file"
        )

    def test_a_worker_with_a_larger_context_makes_a_retry_worth_it(self, store: Store) -> None:
        job_id = ended(store, {0: None, 1: ErrorCode.CONTEXT_LENGTH_EXCEEDED}, tokens=100)
        assert "runs those that may succeed now" in retry_advice(store.jobs.job(job_id), store)


def test_the_table_loads_no_database() -> None:
    code = "import sys, batchmill.jobs.requests.causes; print('sqlalchemy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


@pytest.mark.parametrize(("count", "said"), [(5, "all 5 requests succeeded"), (1, "its 1 request succeeded")])
def test_a_retry_of_a_job_of_which_all_succeeded_says_so(store: Store, count: int, said: str) -> None:
    job_id = ended(store, dict.fromkeys(range(count)))
    chances = some()
    retried = store.retries.retry(job_id, chances)
    (line,) = retry_lines(JobStatus.read(store, job_id), retried, chances)
    assert line == f"job {job_id}: nothing to run again: {said}"
