"""Reasons why a job does not move: every finding, its verdict and its advice, on both databases."""

from __future__ import annotations

from dataclasses import replace

import pytest
from sqlalchemy import update

from batchmill.jobs.errors import NotFound
from batchmill.jobs.models.spec import ModelSpec
from batchmill.jobs.requests.request import ErrorCode
from batchmill.jobs.requests.states import WorkerState
from batchmill.jobs.runtime.process.process import Process
from batchmill.jobs.store.leases.lease import BatchReport
from batchmill.jobs.store.tables import batches
from batchmill.producer.views.diagnosis.verdict import Verdict
from tests.support.diagnosis import AWAY, LLAMA, START, Place, expect, finding
from tests.support.store import mill


class TestClosedAndMoving:
    def test_a_job_that_succeeded_needs_nothing(self, place: Place) -> None:
        job_id = mill.load(place.store, 3)
        mill.work_off(place.store, mill.session(place.store))
        reason = expect(place.diagnose(job_id), Verdict.CLOSED, "closed")
        assert reason.remedy == f"`batchmill results {job_id}` writes its outputs"
        assert reason.message.endswith("0 failed, 0 cancelled; finished: 3 stop")

    def test_a_job_that_failed_names_results_and_retry(self, place: Place) -> None:
        job_id = mill.load(place.store, 3)
        mill.work_off(place.store, mill.session(place.store), error=ErrorCode.ENGINE_ERROR)
        reason = expect(place.diagnose(job_id), Verdict.CLOSED, "closed")
        assert "3 failed" in reason.message
        assert reason.remedy.endswith(f"; `batchmill retry {job_id}` runs those that may succeed now")

    def test_a_retry_that_would_move_nothing_is_not_advised(self, place: Place) -> None:
        job_id = mill.load(place.store, 3)
        mill.work_off(place.store, mill.session(place.store), error=ErrorCode.EMPTY_PROMPT)
        assert expect(place.diagnose(job_id), Verdict.CLOSED, "closed").remedy == (
            f"`batchmill results {job_id} --only failed` shows what did not succeed; a retry would skip them"
            f" (3 empty_prompt: its line alone decides that); `batchmill retry {job_id} --all` runs these too;"
            " submit corrected lines as a new file"
        )

    def test_answers_in_the_last_minute_are_moving_with_an_end(self, place: Place) -> None:
        who = mill.session(place.store)
        job_id = mill.load(place.store, 20)
        place.later(10, who)
        for _ in range(3):
            (claimed,) = mill.claim(place.store, who)
            place.later(10, who)
            mill.save(place.store, who, [mill.answered(claimed)])
        mill.claim(place.store, who)
        place.later(2, who)
        diagnosis = place.diagnose(job_id, AWAY)
        assert "the last answer came 2 s ago; it ends in " in expect(diagnosis, Verdict.MOVING, "moving").message
        assert (
            "12 of 20 requests ended; 1 batch pending (the next one for 42 s), 1 held"
            in finding(diagnosis, "progress").message
        )
        assert "worker w on host (cpu) holds 1 batch since" in finding(diagnosis, "held").message
        assert "busy workers go on" in finding(diagnosis, "redis_away").message

    def test_a_held_batch_without_answers_yet_is_in_somebodys_hands(self, place: Place) -> None:
        who = mill.session(place.store)
        job_id = mill.load(place.store, 4)
        mill.claim(place.store, who)
        place.later(15, who)
        assert "no answer yet" in expect(place.diagnose(job_id), Verdict.MOVING, "at_work").message

    def test_a_long_silence_under_a_renewed_lease_says_who_ends_it(self, place: Place) -> None:
        who = mill.session(place.store)
        job_id = mill.load(place.store, 4)
        (claimed,) = mill.claim(place.store, who)
        mill.save(place.store, who, [mill.answered(claimed, count=1)])
        for _ in range(3):
            place.later(50, who)
            mill.save(place.store, who, [BatchReport(claimed.lease)])
        reason = expect(place.diagnose(job_id), Verdict.MOVING, "at_work")
        assert "no answer for 2 min 30 s" in reason.message
        assert "600 s" in reason.remedy


class TestNames:
    def test_a_name_like_that_of_a_known_model_is_asked_about(self, place: Place) -> None:
        job_id = mill.load(place.store, 3, spec=ModelSpec("dmeo"))
        reason = expect(place.diagnose(job_id), Verdict.STUCK, "likely_slip")
        assert reason.message == "'dmeo' is no folder here, no cached model and no org/name: did you mean demo?"
        assert reason.remedy == (
            f"`batchmill cancel {job_id}`, and submit it again with -m demo; if dmeo is what you mean, start a worker:"
            " batchmill worker -m dmeo -q nf4"
        )


class TestLeases:
    def test_a_dead_holder_loses_its_lease_at_a_known_time(self, place: Place) -> None:
        dead = mill.session(place.store, name="dead")
        job_id = mill.load(place.store, 4)
        mill.claim(place.store, dead)
        place.later(30)
        mill.session(place.store, name="other", spec=LLAMA)
        reason = expect(place.diagnose(job_id), Verdict.WAITING, "dead_holder")
        assert "worker dead on host (cpu) holds 1 batch since 1970-01-12 13:46:40 UTC (30 s)" in reason.message
        assert "last seen 30 s ago; the lease runs until 1970-01-12 13:47:40 UTC, for another 30 s" in reason.message
        assert "a live worker requeues them within 1 min 0 s of the lease's end" in reason.remedy

    def test_a_lease_without_anybody_alive_is_never_taken_back(self, place: Place) -> None:
        job_id = mill.load(place.store, 4)
        mill.claim(place.store, mill.session(place.store))
        place.later(100)
        reason = expect(place.diagnose(job_id), Verdict.STUCK, "nobody_reconciles")
        assert "the lease expired at 1970-01-12 13:47:40 UTC, 40 s ago" in reason.message
        assert reason.remedy.endswith(f"start one: {START}")

    def test_a_killed_worker_of_this_machine_is_known_to_be_gone_at_once(self, place: Place) -> None:
        live = Process.own()
        assert live is not None
        killed = replace(live, start_ticks=live.start_ticks - 1)
        who = mill.session(place.store, process=killed)
        job_id = mill.load(place.store, 4)
        assert START in expect(place.diagnose(job_id), Verdict.STUCK, "no_worker").remedy
        mill.claim(place.store, who)
        place.later(3)
        reason = expect(place.diagnose(job_id), Verdict.STUCK, "nobody_reconciles")
        assert "has ended or is unreachable, last seen 3 s ago" in reason.message
        mill.session(place.store, name="other", spec=LLAMA)
        expect(place.diagnose(job_id), Verdict.WAITING, "dead_holder")

    def test_a_frozen_process_loses_its_lease_while_its_worker_lives(self, place: Place) -> None:
        who = mill.session(place.store)
        job_id = mill.load(place.store, 4)
        mill.claim(place.store, who)
        place.later(70, who)
        reason = expect(place.diagnose(job_id), Verdict.WAITING, "lease_expired")
        assert "is alive but does not renew it" in reason.message

    def test_a_lease_that_live_workers_leave_alone_is_a_reason_to_act(self, place: Place) -> None:
        who = mill.session(place.store)
        job_id = mill.load(place.store, 4)
        mill.claim(place.store, who)
        place.later(200, who)
        assert (
            "`batchmill logs --level warning`" in expect(place.diagnose(job_id), Verdict.STUCK, "lease_expired").remedy
        )

    def test_a_lease_of_a_clock_that_was_set_back_is_no_work_in_progress(self, place: Place) -> None:
        who = mill.session(place.store)
        job_id = mill.load(place.store, 4)
        mill.claim(place.store, who)
        place.later(-3_600, who)
        reason = expect(place.diagnose(job_id), Verdict.WAITING, "lease_expired")
        assert "which no lease does: the store's clock was set back" in reason.message
        assert "a live worker requeues them" in reason.remedy

    def test_suspects_and_crashes_are_named(self, place: Place) -> None:
        who = mill.session(place.store)
        job_id = mill.load(place.store, 4)
        mill.claim(place.store, who)
        place.store.recovery.take_back(who.worker_id, generation=1)
        diagnosis = place.diagnose(job_id)
        assert "4 requests in 1 batch were in a worker when its process died" in finding(diagnosis, "suspects").message
        crashed = finding(diagnosis, "crashed")
        assert "a process of w on host died on this job, 1 time, the last at" in crashed.message
        assert crashed.remedy == "`batchmill logs w` on host shows why"

    def test_a_worker_that_ended_itself_is_told_by_the_log_of_its_supervisor(self, place: Place) -> None:
        live = Process.own()
        assert live is not None
        who = mill.session(place.store, name="gpu 1", process=replace(live, start_ticks=live.start_ticks - 1))
        job_id = mill.load(place.store, 4)
        mill.claim(place.store, who)
        place.later(3)
        place.store.recovery.take_back(who.worker_id, generation=1)
        assert finding(place.diagnose(job_id), "crashed").remedy == (
            "the worker itself ended: `batchmill logs 'gpu 1'` on host has its last lines, and `batchmill logs"
            " supervisor` there shows how it ended, if `up`, `run` or `--devices` started it and outlived it"
        )

    @pytest.mark.parametrize("then", ["lives on", "stops"])
    def test_a_worker_that_outlived_its_process_says_itself_how_that_ended(self, place: Place, then: str) -> None:
        who = mill.session(place.store)
        job_id = mill.load(place.store, 4)
        mill.claim(place.store, who)
        place.later(3)
        place.store.recovery.take_back(who.worker_id, generation=1)
        if then == "stops":
            place.store.registration.enter(who.worker_id, WorkerState.STOPPED)
        else:
            place.later(1, who)
        place.later(600)
        assert finding(place.diagnose(job_id), "crashed").remedy == "`batchmill logs w` on host shows why"

    def test_a_lease_that_ran_out_is_no_death(self, place: Place) -> None:
        who = mill.session(place.store)
        job_id = mill.load(place.store, 4)
        mill.claim(place.store, who)
        place.later(100, who)
        place.store.recovery.reap(place.store.recovery.expired(lease_seconds=mill.LEASE_SECONDS))
        crashed = finding(place.diagnose(job_id), "crashed")
        assert "let its lease expire" in crashed.message
        assert crashed.remedy == "`batchmill logs w` on host has its log of that time"


class TestEnding:
    def test_a_cancel_waits_for_who_holds_the_rest(self, place: Place) -> None:
        who = mill.session(place.store)
        job_id = mill.load(place.store, 8)
        mill.claim(place.store, who)
        place.store.closing.cancel(job_id)
        reason = expect(place.diagnose(job_id), Verdict.WAITING, "cancelling")
        assert "waits for worker w on host to release 1 batch" in reason.message

    def test_a_cancel_of_what_the_dead_hold_is_ended_by_status(self, place: Place) -> None:
        job_id = mill.load(place.store, 8)
        mill.claim(place.store, mill.session(place.store))
        place.store.closing.cancel(job_id)
        place.later(30)
        diagnosis = place.diagnose(job_id)
        reason = expect(diagnosis, Verdict.STUCK, "nobody_reconciles")
        assert f"`batchmill status {job_id}` requeues them from 1970-01-12 13:48:40 UTC on" in reason.remedy
        assert "worker w on host left 1 batch behind" in finding(diagnosis, "cancelling").message

    def test_a_job_with_nothing_open_is_closed_by_the_next_pass(self, place: Place) -> None:
        job_id = mill.load(place.store, 4)
        mill.claim(place.store, who := mill.session(place.store))
        with place.store.database.write() as connection:
            leased = {"worker_id": None, "worker_generation": None, "lease_until": None}
            connection.execute(update(batches).values(state="done", **leased))
        assert "within 15 s" in expect(place.diagnose(job_id), Verdict.WAITING, "closing").remedy
        place.store.registration.enter(who.worker_id, WorkerState.STOPPED)
        assert f"batchmill status {job_id}" in expect(place.diagnose(job_id), Verdict.STUCK, "closing").remedy

    def test_a_job_that_is_loading_is_no_job_yet(self, place: Place) -> None:
        job_id = mill.begin(place.store)
        with pytest.raises(NotFound):
            place.store.blockers.around(job_id, lease_seconds=60.0)
