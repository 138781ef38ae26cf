"""The identity of a job's model in the store: fixed by the first claim, and no other model answers the rest."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
from sqlalchemy import update

from batchmill.jobs.configuration.settings import Settings
from batchmill.jobs.errors import StoreBusy
from batchmill.jobs.models.adapters import Adapter
from batchmill.jobs.requests.request import ErrorCode
from batchmill.jobs.requests.states import JobState, RunOutcome, WorkerState
from batchmill.jobs.store.leases.lease import BatchReport, Claimed, WorkerSession
from batchmill.jobs.store.store import Store
from batchmill.jobs.store.tables import jobs, workers
from batchmill.producer.cli.text.job_lines import job_lines
from batchmill.producer.views.diagnosis.snapshot import QueueState
from batchmill.producer.views.diagnosis.verdict import Diagnosis, Verdict, diagnose
from batchmill.producer.views.reasons import missing_lines
from batchmill.producer.views.status import JobStatus
from tests.support.store import mill
from tests.support.store.oracle import violations
from tests.support.store.races import at_once

OLD, NEW = "tokenizer=1 weights=1", "tokenizer=1 weights=2"
A = Adapter("a", "/adapters/a")
OLD_A, NEW_A = replace(A, identity="weights=1"), replace(A, identity="weights=2")
REMEDY = "to finish it, restore the old model and restart a worker; to have the new one answer everything, "


@pytest.fixture
def store(clocked: Store) -> Iterator[Store]:
    yield clocked
    assert violations(clocked, closed=False) == []


def begun_by(store: Store, who: WorkerSession, count: int = 8) -> str:
    """A job of which this worker has answered the first batch, and that nobody holds any more."""
    job_id = mill.load(store, count)
    (claimed,) = mill.claim(store, who)
    mill.save(store, who, [mill.answered(claimed)])
    store.registration.enter(who.worker_id, WorkerState.STOPPED)
    return job_id


def diagnosed(store: Store, job_id: str) -> Diagnosis:
    settings = Settings(broker_url="redis://mill/0")
    return diagnose(JobStatus.read(store, job_id, settings), store, QueueState(), settings)


class TestClaiming:
    def test_a_job_is_of_the_model_that_began_it(self, store: Store) -> None:
        job_id = mill.load(store, 8)
        assert store.jobs.job(job_id).identity is None
        who = mill.session(store, identity=OLD)
        mill.claim(store, who)
        assert store.jobs.job(job_id).identity == OLD

    def test_another_model_does_not_take_what_is_left(self, store: Store) -> None:
        first = begun_by(store, mill.session(store, identity=OLD))
        later = mill.load(store, 4)
        newer = mill.session(store, name="newer", identity=NEW)
        assert [each.lease.job_id for each in mill.claim(store, newer, wanted=99)] == [later]
        assert mill.claim(store, newer) == ()
        same = mill.session(store, name="same", identity=OLD)
        assert mill.work_off(store, same) == 4
        assert store.jobs.job(first).state is JobState.COMPLETED
        assert store.jobs.job(later).identity == NEW

    def test_a_model_whose_files_have_changed_answers_only_what_it_began(self, store: Store) -> None:
        who = mill.session(store, identity=OLD)
        begun = mill.load(store, 8)
        mill.claim(store, who)
        mill.load(store, 4)
        stale = replace(who, may_begin=False)
        assert {each.lease.job_id for each in mill.claim(store, stale, wanted=99)} == {begun}
        assert mill.claim(store, stale) == ()
        assert len(mill.claim(store, who)) == 1

    def test_a_suspect_of_a_crash_is_not_taken_either(self, store: Store) -> None:
        mill.load(store, 1)
        crashing = mill.session(store, identity=OLD)
        mill.claim(store, crashing)
        store.recovery.take_back(crashing.worker_id, generation=crashing.generation)
        assert mill.claim(store, mill.session(store, name="newer", identity=NEW)) == ()
        (claimed,) = mill.claim(store, mill.session(store, name="same", identity=OLD))
        assert claimed.lease.apart

    def test_a_retry_is_of_the_same_model(self, store: Store) -> None:
        job_id = mill.load(store, 4)
        mill.work_off(store, mill.session(store, identity=OLD), error=ErrorCode.ENGINE_ERROR)
        store.retries.retry(job_id)
        assert mill.claim(store, mill.session(store, name="newer", identity=NEW)) == ()
        assert mill.claim(store, mill.session(store, name="same", identity=OLD))

    def test_an_unfinished_job_of_before_takes_the_model_of_its_next_claim(self, store: Store) -> None:
        job_id = begun_by(store, mill.session(store, identity=OLD))
        with store.database.write() as connection:
            for table in (jobs, workers):
                connection.execute(update(table).values(identity=None))
        newer = mill.session(store, name="newer", identity=NEW)
        assert mill.claim(store, newer)
        assert store.jobs.job(job_id).identity == NEW
        assert mill.claim(store, mill.session(store, name="older", identity=OLD)) == ()

    def test_of_two_models_that_begin_a_job_at_once_one_runs_it(self, store: Store) -> None:
        sessions = [mill.session(store, name=name, identity=name) for name in (OLD, NEW)]
        chance = random.Random(3)

        def claim(who: WorkerSession) -> tuple[Claimed, ...]:
            try:
                return mill.claim(store, who)
            except StoreBusy:
                return ()  # the saver turns again

        for _ in range(20):
            job_id = mill.load(store, 8)
            got = at_once(chance, lambda: claim(sessions[0]), lambda: claim(sessions[1]))
            (who, claimed) = next(each for each in zip(sessions, got, strict=True) if each[1])
            assert len([each for each in got if each]) == 1
            assert store.jobs.job(job_id).identity == who.identity
            mill.save(store, who, [mill.answered(*claimed)])
            mill.work_off(store, who)
            assert store.jobs.job(job_id).state is JobState.COMPLETED


class TestAdapters:
    def test_only_those_that_a_job_uses_are_compared(self, store: Store) -> None:
        job_id = mill.load_named(store, "a", None, None, None, batch_size=1)
        first = mill.session(store, adapters=[OLD_A])
        for _ in range(2):
            mill.save(store, first, [mill.answered(each) for each in mill.claim(store, first)])
        assert store.jobs.job(job_id).adapters == ()
        store.registration.enter(first.worker_id, WorkerState.STOPPED)
        newer = mill.session(store, name="newer", adapters=[NEW_A])
        assert mill.work_off(store, newer) == 2
        assert store.jobs.job(job_id).adapters == (NEW_A,)

    def test_what_another_one_began_is_left(self, store: Store) -> None:
        job_id = mill.load_named(store, "a", "a", None, batch_size=1)
        first = mill.session(store, adapters=[OLD_A])
        for _ in range(2):
            mill.save(store, first, [mill.answered(each) for each in mill.claim(store, first)])
        store.registration.enter(first.worker_id, WorkerState.STOPPED)
        assert store.jobs.job(job_id).adapters == (OLD_A,)
        newer = mill.session(store, name="newer", adapters=[NEW_A])
        assert mill.claim(store, newer) == ()
        diagnosis = diagnosed(store, job_id)
        assert diagnosis.verdict is Verdict.STUCK
        assert diagnosis.findings[0].message == (
            "1 batch waits for the adapter a, which no live worker holds: /adapters/a has changed since"
            " this job used it, and worker newer on host holds the new version"
        )
        assert diagnosis.findings[0].remedy == f"{REMEDY}`batchmill cancel {job_id}` and submit the file again"

    def test_a_job_of_before_takes_what_lies_there_at_its_next_claim(self, store: Store) -> None:
        job_id = mill.load_named(store, "a", "a", batch_size=1)
        first = mill.session(store, adapters=[A])
        mill.save(store, first, [mill.answered(each) for each in mill.claim(store, first)])
        assert store.jobs.job(job_id).adapters == (A,)
        store.registration.enter(first.worker_id, WorkerState.STOPPED)
        assert mill.claim(store, mill.session(store, name="newer", adapters=[NEW_A]))
        assert store.jobs.job(job_id).adapters == (NEW_A,)


class TestIdle:
    def test_an_idle_worker_with_another_model_is_left_nothing(self, store: Store) -> None:
        mill.load(store, 12)
        who = mill.session(store, identity=OLD)
        mill.session(store, name="idle", identity=NEW)
        first, *rest = mill.claim(store, who, wanted=99)
        assert len(rest) == 2
        held = [BatchReport(first.lease, in_flight=[0]), *(BatchReport(each.lease, untouched=True) for each in rest)]
        assert store.leases.sync(who, held).released == frozenset()
        mill.session(store, name="idle with it", identity=OLD)
        assert len(store.leases.sync(who, held).released) == 1

    def test_nobody_is_woken_for_what_no_worker_could_take(self, store: Store) -> None:
        job_id = begun_by(store, mill.session(store, identity=OLD))
        spec = mill.ECHO_SPEC
        newer = mill.session(store, name="newer", identity=NEW)
        assert store.recovery.pending_of(spec, most=9) == []
        assert store.recovery.pending(most=9) == {}
        assert store.recovery.pending_of(spec, most=9, worker_id=newer.worker_id) == []
        loading = mill.session(store, name="loading", ready=False)
        assert len(store.recovery.pending_of(spec, most=9)) == 1
        store.registration.enter(loading.worker_id, WorkerState.STOPPED)
        mill.session(store, name="same", identity=OLD)
        assert len(store.recovery.pending(most=9)[spec.canonical]) == 1
        assert store.jobs.job(job_id).counts.pending == 4

    def test_a_worker_says_what_it_holds_once_it_holds_it(self, store: Store) -> None:
        who = mill.session(store, identity=OLD, adapters=[OLD_A])
        (row,) = store.workers.rows()
        assert (row.identity, row.adapters) == (OLD, (OLD_A,))
        store.registration.new_generation(who.worker_id, child_pid=9)
        (row,) = store.workers.rows()
        assert row.identity is None


class TestDoctor:
    def test_a_job_that_another_model_began_is_stuck_and_says_what_changed(
        self, store: Store, clock: mill.Clock
    ) -> None:
        job_id = begun_by(store, mill.session(store, identity=OLD))
        clock.seconds += 5
        mill.session(store, name="newer", identity=NEW)
        diagnosis = diagnosed(store, job_id)
        assert (diagnosis.verdict, diagnosis.findings[0].code) == (Verdict.STUCK, "another_model")
        message = "it was started with another model than worker newer on host holds; changed since then: weights"
        remedy = f"{REMEDY}`batchmill cancel {job_id}` and submit the file again"
        assert (diagnosis.findings[0].message, diagnosis.findings[0].remedy) == (message, remedy)
        assert "bound_worker" not in {each.code for each in diagnosis.findings}
        lines = job_lines(JobStatus.read(store, job_id))
        assert [line for line in lines if "waiting" in line] == [f"  waiting    {message};", f"  waiting    {remedy}"]

    def test_one_worker_that_holds_its_model_is_enough(self, store: Store) -> None:
        job_id = begun_by(store, mill.session(store, identity=OLD))
        mill.session(store, name="newer", identity=NEW)
        mill.session(store, name="same", identity=OLD)
        assert diagnosed(store, job_id).verdict is Verdict.WAITING
        assert missing_lines(JobStatus.read(store, job_id)) == []

    def test_a_worker_that_loads_may_hold_its_model(self, store: Store) -> None:
        job_id = begun_by(store, mill.session(store, identity=OLD))
        mill.session(store, name="loading", ready=False)
        assert diagnosed(store, job_id).findings[0].code == "loading_model"


def test_what_was_handed_back_in_between_stays_with_its_model(store: Store) -> None:
    mill.load(store, 4)
    who = mill.session(store, identity=OLD)
    mill.claim(store, who)
    store.recovery.take_back(who.worker_id, generation=who.generation, outcome=RunOutcome.RELEASED)
    assert mill.claim(store, mill.session(store, name="newer", identity=NEW)) == ()
