"""The end of jobs and their reopening: cancel and retry, on SQLite and on PostgreSQL."""

from __future__ import annotations

import pytest
from sqlalchemy import select

from batchmill.jobs.errors import JobStateError
from batchmill.jobs.requests.request import ErrorCode
from batchmill.jobs.requests.states import JobState, RequestState
from batchmill.jobs.store.jobs import retry
from batchmill.jobs.store.leases.lease import BatchReport
from batchmill.jobs.store.store import Store
from batchmill.jobs.store.tables import batches, outputs
from tests.support.store import mill


def states_of(store: Store, job_id: str) -> dict[str, int]:
    counts = store.jobs.job(job_id).counts
    return {
        "succeeded": counts.succeeded,
        "failed": counts.failed,
        "cancelled": counts.cancelled,
        "pending": counts.pending,
    }


def output_states(store: Store) -> list[str]:
    with store.database.read() as connection:
        return list(connection.scalars(select(outputs.c.state).order_by(outputs.c.index)))


def test_cancel_closes_what_nobody_holds_and_the_holder_closes_the_rest(store: Store) -> None:
    job_id = mill.load(store, 10)
    who = mill.session(store)
    (claimed,) = mill.claim(store, who)
    mill.save(store, who, [mill.answered(claimed, count=1)])
    assert store.closing.cancel(job_id) is JobState.CANCELLING
    assert states_of(store, job_id) == {"succeeded": 1, "failed": 0, "cancelled": 6, "pending": 3}
    more = BatchReport(claimed.lease, outputs=[mill.output(job_id, 1)])
    turned = mill.save(store, who, [more])
    assert turned.cancelled == {claimed.lease.batch_id}
    assert states_of(store, job_id) == {"succeeded": 2, "failed": 0, "cancelled": 8, "pending": 0}
    assert store.jobs.job(job_id).state is JobState.CANCELLED
    assert output_states(store) == ["succeeded"] * 2 + ["cancelled"] * 8
    assert mill.claim(store, who) == ()


def test_cancel_is_idempotent_and_leaves_a_closed_job_alone(store: Store) -> None:
    cancelled, completed = mill.load(store, 5), mill.load(store, 4)
    assert store.closing.cancel(cancelled) is JobState.CANCELLED
    assert store.closing.cancel(cancelled) is JobState.CANCELLED
    mill.work_off(store, mill.session(store))
    assert store.closing.cancel(completed) is JobState.COMPLETED
    assert states_of(store, completed)["succeeded"] == 4


def test_a_cancelled_batch_of_a_dead_worker_is_closed_by_the_reconciler(store: Store) -> None:
    job_id = mill.load(store, 4)
    who = mill.session(store)
    mill.claim(store, who)
    assert store.closing.cancel(job_id) is JobState.CANCELLING
    store.recovery.take_back(who.worker_id, generation=who.generation)
    assert store.closing.close_finished() == [job_id]
    assert states_of(store, job_id) == {"succeeded": 0, "failed": 0, "cancelled": 4, "pending": 0}


def test_a_job_whose_requests_all_failed_is_completed(store: Store) -> None:
    job_id = mill.load(store, 4)
    mill.work_off(store, mill.session(store), error=ErrorCode.ENGINE_ERROR)
    assert store.jobs.job(job_id).state is JobState.COMPLETED
    assert states_of(store, job_id)["failed"] == 4


def test_a_job_with_nothing_open_is_closed_by_the_reconciler(store: Store) -> None:
    job_id = mill.load(store, 4)
    who = mill.session(store)
    mill.work_off(store, who)
    with store.database.write() as connection:  # as if the worker had died before it closed the job
        connection.exec_driver_sql("UPDATE jobs SET state = 'running', finished_at = NULL")
    assert store.closing.close_finished() == [job_id]
    assert store.jobs.job(job_id).state is JobState.COMPLETED


def test_retry_runs_only_what_did_not_succeed(store: Store) -> None:
    job_id = mill.load(store, 10, batch_size=5)
    who = mill.session(store)
    (first,) = mill.claim(store, who)
    failed = [mill.output(job_id, index, error=ErrorCode.OUT_OF_MEMORY) for index in (1, 3)]
    good = [mill.output(job_id, index) for index in (0, 2, 4)]
    mill.save(store, who, [BatchReport(first.lease, outputs=failed + good)])
    store.closing.cancel(job_id)
    assert states_of(store, job_id) == {"succeeded": 3, "failed": 2, "cancelled": 5, "pending": 0}
    assert store.retries.retry(job_id).moved == 7
    assert store.jobs.job(job_id).state is JobState.QUEUED
    assert states_of(store, job_id) == {"succeeded": 3, "failed": 0, "cancelled": 0, "pending": 7}
    taken = mill.claim(store, who, wanted=100)
    assert [each.index for batch in taken for each in batch.requests] == [1, 3, 5, 6, 7, 8, 9]
    mill.save(store, who, [mill.answered(each) for each in taken])
    job = store.jobs.job(job_id)
    assert job.state is JobState.COMPLETED
    assert states_of(store, job_id) == {"succeeded": 10, "failed": 0, "cancelled": 0, "pending": 0}
    assert (job.counts.total, job.counts.prompt_tokens, job.counts.completion_tokens) == (10, 20, 30)
    with store.database.read() as connection:
        assert sorted(connection.scalars(select(batches.c.total))) == [0, 2, 3, 5]


def test_retry_of_an_open_job_is_refused(store: Store) -> None:
    job_id = mill.load(store, 4)
    with pytest.raises(JobStateError, match="is queued"):
        store.retries.retry(job_id)


def test_retry_with_nothing_to_do_leaves_the_job_closed(store: Store) -> None:
    job_id = mill.load(store, 4)
    mill.work_off(store, mill.session(store))
    assert store.retries.retry(job_id).moved == 0
    assert store.jobs.job(job_id).state is JobState.COMPLETED
    assert store.retries.retry(job_id).moved == 0


def test_a_retry_cut_short_is_finished_by_the_same_command(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "PAGE_REQUESTS", 3)
    job_id = mill.load(store, 8)
    who = mill.session(store)
    mill.work_off(store, who, error=ErrorCode.ENGINE_ERROR)
    store.retries._begin_retry(job_id)  # a retry that was killed after its first page
    assert store.retries._retry_page(job_id, [0, 1, 2]) == (3, [])
    assert mill.work_off(store, who) == 3
    assert store.jobs.job(job_id).state is JobState.COMPLETED
    assert states_of(store, job_id) == {"succeeded": 3, "failed": 5, "cancelled": 0, "pending": 0}
    assert store.retries.retry(job_id).moved == 5
    assert mill.work_off(store, who) == 5
    assert states_of(store, job_id) == {"succeeded": 8, "failed": 0, "cancelled": 0, "pending": 0}
    assert RequestState.FAILED.value not in output_states(store)


def test_a_retry_after_the_clock_was_set_back_leaves_nothing_out(clocked: Store, clock: mill.Clock) -> None:
    job_id = mill.load(clocked, 8)
    mill.work_off(clocked, mill.session(clocked), error=ErrorCode.OUT_OF_MEMORY)
    clock.seconds -= 100
    assert clocked.retries.retry(job_id).moved == 8
