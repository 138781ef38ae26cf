"""Workers' use of time for a job, over the time really worked, and the sample by which its end is estimated."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import Connection, event, text

from batchmill.jobs.requests.generation import GenerationRequest, SamplingParams
from batchmill.jobs.requests.request import ErrorCode
from batchmill.jobs.requests.states import RequestState
from batchmill.jobs.store.leases.lease import BatchReport
from batchmill.jobs.store.store import Store
from batchmill.jobs.store.views.sample import SAMPLED, SampledRequest, spread
from batchmill.jobs.store.views.usage import Pace
from tests.support.store import mill


class TestPaces:
    def test_each_worker_has_its_own_seconds_and_tokens(self, clocked: Store, clock: mill.Clock) -> None:
        job_id = mill.load(clocked, 12)
        sessions = [mill.session(clocked, name=name) for name in "ab"]
        (first,), (second,) = (mill.claim(clocked, session) for session in sessions)
        clock.seconds += 2
        mill.save(clocked, sessions[0], [mill.answered(first, count=3)])
        clock.seconds += 2
        mill.save(clocked, sessions[1], [replace(mill.answered(second, count=1), in_flight_tokens=5)])
        a, b = clocked.usage.of(job_id).paces
        assert a == Pace(sessions[0].worker_id, 4.0, 3, 6, 9, 0, 4.0, 9.0)
        assert b == Pace(sessions[1].worker_id, 4.0, 1, 2, 3, 5, 4.0, 8.0)
        assert clocked.usage.of(job_id).running_seconds == 4.0

    def test_the_last_minute_is_told_apart(self, clocked: Store, clock: mill.Clock) -> None:
        job_id = mill.load(clocked, 8)
        who = mill.session(clocked)
        for seconds, minutes_later in ((40.0, 10), (20.0, 0)):
            (claimed,) = mill.claim(clocked, who)
            clock.seconds += seconds
            mill.save(clocked, who, [mill.answered(claimed)])
            clock.seconds += 60 * minutes_later
        (pace,) = clocked.usage.of(job_id).paces
        assert (pace.seconds, pace.completion_tokens) == (60.0, 24)
        assert (pace.late_seconds, pace.late_tokens) == (20.0, pytest.approx(12.0))

    def test_refused_prompts_are_no_throughput(self, clocked: Store, clock: mill.Clock) -> None:
        job_id = mill.load(clocked, 4)
        who = mill.session(clocked)
        (claimed,) = mill.claim(clocked, who)
        clock.seconds += 2
        refused = [mill.output(job_id, index, error=ErrorCode.CONTEXT_LENGTH_EXCEEDED) for index in (0, 1)]
        mill.save(clocked, who, [BatchReport(claimed.lease, outputs=refused, in_flight=(2, 3))])
        effort = clocked.usage.of(job_id)
        assert (effort.recent_requests_per_second, effort.paces[0].prompt_tokens) == (0.0, 0)
        assert clocked.jobs.job(job_id).counts.prompt_tokens == 4

    def test_a_job_that_was_cancelled_in_the_queue_waits_no_longer(self, clocked: Store, clock: mill.Clock) -> None:
        job_id = mill.load(clocked, 4)
        clock.seconds += 5
        assert clocked.usage.of(job_id).queued_seconds == pytest.approx(5.0)
        clocked.closing.cancel(job_id)
        clock.seconds += 60
        assert clocked.usage.of(job_id).queued_seconds == pytest.approx(5.0)

    def test_tokens_in_flight_are_gone_once_the_run_has_ended(self, clocked: Store) -> None:
        job_id = mill.load(clocked, 4)
        who = mill.session(clocked)
        (claimed,) = mill.claim(clocked, who)
        mill.save(clocked, who, [BatchReport(claimed.lease, in_flight=(0, 1), in_flight_tokens=7)])
        assert clocked.usage.of(job_id).paces[0].in_flight_tokens == 7
        clocked.recovery.take_back(who.worker_id, generation=who.generation)
        assert clocked.usage.of(job_id).paces[0].in_flight_tokens == 0

    def test_hours_in_which_nobody_lived_are_no_work(self, clocked: Store, clock: mill.Clock) -> None:
        """The mill was killed, and what its worker held is taken back hours later."""
        job_id = mill.load(clocked, 8)
        who = mill.session(clocked)
        (claimed,) = mill.claim(clocked, who)
        for _ in range(4):
            clock.seconds += 5
            clocked.registration.heartbeat(who.worker_id, beat=5.0)
        mill.save(clocked, who, [mill.answered(claimed, count=2)])
        clock.seconds += 3 * 3_600
        assert clocked.usage.of(job_id).running_seconds == 25.0, "until the next heartbeat was due"
        clocked.recovery.take_back(who.worker_id, generation=who.generation)
        assert clocked.usage.of(job_id).running_seconds == 25.0
        other = mill.session(clocked, name="other")
        mill.work_off(clocked, other)
        clock.seconds += 3_600
        assert clocked.usage.of(job_id).running_seconds == 25.0

    def test_of_a_run_that_a_worker_ended_itself_every_second_counts(self, clocked: Store, clock: mill.Clock) -> None:
        job_id = mill.load(clocked, 4)
        who = mill.session(clocked)
        (claimed,) = mill.claim(clocked, who)
        clock.seconds += 12  # no heartbeat came in between
        mill.save(clocked, who, [mill.answered(claimed)])
        clock.seconds += 3_600
        assert clocked.usage.of(job_id).running_seconds == 12.0


class TestSample:
    def test_it_lies_over_the_whole_file_and_over_what_was_begun(self) -> None:
        assert spread(3, begun=2) == [0, 1, 2]
        sampled = spread(1_000_000, begun=10_000)
        assert len(sampled) <= 2 * SAMPLED
        assert sampled == sorted(set(sampled))
        assert len([each for each in sampled if each < 10_000]) >= SAMPLED
        assert sampled[-1] >= 1_000_000 * (SAMPLED - 1) // SAMPLED

    def test_it_tells_bytes_states_and_tokens(self, store: Store) -> None:
        job_id = mill.load(store, 4)
        who = mill.session(store)
        (claimed,) = mill.claim(store, who)
        outputs = [mill.output(job_id, 0), mill.output(job_id, 1, error=ErrorCode.ENGINE_ERROR)]
        mill.save(store, who, [BatchReport(claimed.lease, outputs=outputs, in_flight=(2, 3))])
        body_bytes = len(mill.prompts(1)[0].to_body())
        assert store.samples.of(job_id, total=4, begun=4) == (
            SampledRequest(0, body_bytes, RequestState.SUCCEEDED, 3),
            SampledRequest(1, body_bytes, RequestState.FAILED, 0),
            SampledRequest(2, body_bytes),
            SampledRequest(3, body_bytes),
        )

    def test_it_tells_how_long_a_line_lets_its_answer_get(self, store: Store) -> None:
        said = [SamplingParams(max_tokens=8), SamplingParams(max_tokens=8, n=3), SamplingParams(n=3), SamplingParams()]
        prompts = [GenerationRequest(index, str(index), "a", sampling=each) for index, each in enumerate(said)]
        prompts.append(GenerationRequest(4, "4", "a" * 100_000, sampling=said[0]))
        job_id = mill.begin(store)
        store.creation.add(job_id, prompts=prompts, batch_size=8, lease_seconds=60)
        store.creation.open(
            job_id, spec=mill.ECHO_SPEC, file_sha256="0" * 64, fingerprint="f", lease_seconds=mill.LEASE_SECONDS
        )
        sample = store.samples.of(job_id, total=5, begun=0, choices=2)
        assert [each.max_tokens for each in sample] == [16, 24, None, None, None]

    def test_what_an_estimate_asks_scans_no_requests_and_no_outputs(self, store: Store) -> None:
        """Of a job among many rows: each question about it goes by an index."""
        job_id = mill.load(store, 3_000, batch_size=100)
        mill.work_off(store, mill.session(store))
        plans = []
        for statement, parameters in _asked(store, job_id):
            with store.database.read() as connection:
                plans.append(_plan(connection, statement, parameters, is_sqlite=store.database.is_sqlite))
        assert any("outputs" in plan for plan in plans)
        assert any("runs" in plan for plan in plans)
        for plan in plans:
            for table in ("requests", "outputs", "runs", "batches", "workers"):
                assert f"SCAN {table}" not in plan, plan
                assert f"Seq Scan on {table}" not in plan, plan


def _asked(store: Store, job_id: str) -> list[tuple[str, Any]]:
    """The statements that the effort and the sample of a job are read by."""
    found: list[tuple[str, Any]] = []

    def note(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if statement.startswith("SELECT") and ("runs" in statement or "requests" in statement):
            found.append((statement, parameters))

    with store.database.read() as connection:
        engine = connection.engine
    event.listen(engine, "before_cursor_execute", note)
    store.usage.of(job_id)
    store.samples.of(job_id, total=3_000, begun=1_000)
    event.remove(engine, "before_cursor_execute", note)
    return found


def _plan(connection: Connection, statement: str, parameters: Any, *, is_sqlite: bool) -> str:
    if not is_sqlite:
        # Of so few rows the planner would read a whole table sooner; where it can go by an index, it does.
        connection.execute(text("SET LOCAL enable_seqscan = off"))
    explain = "EXPLAIN QUERY PLAN " if is_sqlite else "EXPLAIN "
    return "\n".join(str(row) for row in connection.exec_driver_sql(explain + statement, parameters))
