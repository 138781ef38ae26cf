"""The store's contract, the same on SQLite and on PostgreSQL: loading, claiming, saving, finishing."""

from __future__ import annotations

from unittest.mock import patch

import pytest
from sqlalchemy import select, update

from batchmill.jobs.errors import LoadingLost, NotFound
from batchmill.jobs.models.quantization import Kind, Quantization
from batchmill.jobs.models.spec import ModelSpec
from batchmill.jobs.requests.generation import Choice, GenerationOptions, SamplingParams
from batchmill.jobs.requests.request import ErrorCode, Output, RequestKey, Timings
from batchmill.jobs.requests.states import JobState, RequestState, RunOutcome, WorkerState
from batchmill.jobs.store.leases.lease import BatchReport
from batchmill.jobs.store.store import Store
from batchmill.jobs.store.tables import batches, jobs, runs
from tests.support.store import mill

ALL = frozenset({RequestState.SUCCEEDED, RequestState.FAILED, RequestState.CANCELLED})


def outputs_of(store: Store, job_id: str) -> list[int]:
    return [row.index for page in store.jobs.output_pages(job_id, states=ALL, page=3) for row in page]


class TestLoading:
    def test_a_job_is_seen_and_claimed_only_once_it_is_open(self, store: Store) -> None:
        who = mill.session(store)
        job_id = mill.begin(store)
        store.creation.add(job_id, prompts=mill.prompts(5), batch_size=4, lease_seconds=60)
        with pytest.raises(NotFound):
            store.jobs.find(job_id)
        with pytest.raises(NotFound):
            store.jobs.job(job_id)
        assert store.jobs.jobs(most=5) == []
        assert mill.claim(store, who) == ()
        store.creation.open(job_id, spec=mill.ECHO_SPEC, file_sha256="a", fingerprint="f", lease_seconds=60)
        assert store.jobs.job(job_id).counts.total == 5
        assert len(mill.claim(store, who)) == 1

    def test_batches_are_filled_across_pages(self, store: Store) -> None:
        job_id = mill.begin(store)
        for first, count in ((0, 3), (3, 6), (9, 1)):
            store.creation.add(job_id, prompts=mill.prompts(count, first=first), batch_size=4, lease_seconds=60)
        with store.database.read() as connection:
            sizes = connection.scalars(select(batches.c.total).order_by(batches.c.id)).all()
        assert sizes == [4, 4, 2]

    def test_duplicate_ids_are_named_and_the_rest_is_kept(self, store: Store) -> None:
        job_id = mill.begin(store)
        store.creation.add(job_id, prompts=mill.prompts(3), batch_size=4, lease_seconds=60)
        again = [mill.GenerationRequest(3, "request-1", prompt="x"), mill.GenerationRequest(4, "new", prompt="y")]
        again += [mill.GenerationRequest(5, "new", prompt="z")]
        duplicates = store.creation.add(job_id, prompts=again, batch_size=4, lease_seconds=60)
        assert [(each.index, each.custom_id, each.first_index) for each in duplicates] == [
            (3, "request-1", 1),
            (5, "new", 4),
        ]
        assert mill.rows(store, "requests") == 4

    def test_a_lost_lease_stops_the_load(self, clocked: Store, clock: mill.Clock) -> None:
        job_id = mill.begin(clocked)
        clock.seconds += 61
        clocked.creation.renew(job_id, lease_seconds=60)  # a laptop slept meanwhile, and nobody has taken it
        clock.seconds += 61
        expired = clocked.creation.expired(lease_seconds=60)
        with patch.object(clocked.creation, "_delete"):  # who deletes it is in the middle of that
            assert clocked.creation.discard_expired(expired) == [job_id]
        for step in (
            lambda: clocked.creation.add(job_id, prompts=mill.prompts(1), batch_size=4, lease_seconds=60),
            lambda: clocked.creation.renew(job_id, lease_seconds=60),
            lambda: clocked.creation.open(
                job_id, spec=mill.ECHO_SPEC, file_sha256="", fingerprint="", lease_seconds=60
            ),
        ):
            with pytest.raises(LoadingLost):
                step()

    def test_only_expired_loads_are_deleted_by_others(self, clocked: Store, clock: mill.Clock) -> None:
        dead, alive = mill.begin(clocked), mill.begin(clocked)
        for job_id in (dead, alive):
            clocked.creation.add(job_id, prompts=mill.prompts(9), batch_size=4, lease_seconds=60)
        clock.seconds += 50
        clocked.creation.renew(alive, lease_seconds=60)
        clock.seconds += 20
        expired = clocked.creation.expired(lease_seconds=60)
        assert set(expired) == {dead}
        assert clocked.creation.discard_expired(expired | {alive: 0.5}) == [dead]
        assert mill.rows(clocked, "requests") == 9
        assert mill.rows(clocked, "jobs") == 1

    def test_discard_leaves_nothing_and_touches_no_open_job(self, store: Store) -> None:
        open_job = mill.load(store, 3)
        job_id = mill.begin(store)
        store.creation.add(job_id, prompts=mill.prompts(9), batch_size=4, lease_seconds=60)
        store.creation.discard(job_id)
        store.creation.discard(open_job)
        assert (mill.rows(store, "requests"), mill.rows(store, "batches"), mill.rows(store, "jobs")) == (3, 1, 1)


class TestClaiming:
    def test_the_oldest_job_comes_first(self, store: Store) -> None:
        who = mill.session(store)
        first, second = mill.load(store, 4), mill.load(store, 4)
        claimed = [mill.claim(store, who)[0]]
        mill.save(store, who, [mill.answered(claimed[0])])
        claimed += mill.claim(store, who)
        assert [each.lease.job_id for each in claimed] == [first, second]

    def test_only_batches_of_the_own_spec(self, store: Store) -> None:
        mill.load(store, 4, spec=ModelSpec("demo", None, Quantization(Kind.NF4)))
        assert mill.claim(store, mill.session(store)) == ()

    def test_a_worker_bound_to_a_job_leaves_others_alone(self, store: Store) -> None:
        mill.load(store, 4)
        mine = mill.load(store, 4)
        claimed = mill.claim(store, mill.session(store, only_job=mine))
        assert [each.lease.job_id for each in claimed] == [mine]

    def test_beyond_the_first_batch_only_what_no_idle_worker_could_start(self, store: Store) -> None:
        mill.load(store, 12)  # three batches
        who = mill.session(store)
        mill.session(store, name="idle one")
        mill.session(store, name="loading one", ready=False)
        claimed = mill.claim(store, who, wanted=100)
        assert len(claimed) == 2  # the third is for the idle worker
        assert store.leases.sync(who, [BatchReport(each.lease) for each in claimed], wanted_requests=100).claimed == ()

    def test_an_unstarted_batch_goes_to_an_idle_worker(self, store: Store) -> None:
        mill.load(store, 8)
        who = mill.session(store)
        first, second = mill.claim(store, who, wanted=100)
        held = [BatchReport(first.lease, in_flight=[0]), BatchReport(second.lease, untouched=True)]
        assert store.leases.sync(who, held).released == frozenset()
        other = mill.session(store, name="idle")
        assert store.leases.sync(who, held).released == {second.lease.batch_id}
        assert mill.claim(store, other)[0].lease.batch_id == second.lease.batch_id

    def test_what_a_turn_without_an_answer_brought_is_handed_back(self, store: Store) -> None:
        """The worker knows of its first batch alone: it never heard what the second turn had claimed."""
        mill.load(store, 8, batch_size=4)
        who = mill.session(store)
        (held,) = mill.claim(store, who)
        (lost,) = mill.claim(store, who)
        kept = store.leases.sync(who, [mill.answered(held, count=0)], resumed=True)
        assert (kept.lost, kept.released) == (frozenset(), frozenset())
        (again,) = mill.claim(store, mill.session(store, name="other"))
        assert again.lease.batch_id == lost.lease.batch_id

    def test_what_held_for_the_sampling_is_settled_by_the_first_claim(self, store: Store) -> None:
        flags = GenerationOptions("be brief", SamplingParams(temperature=0.0, stop=("x",)))
        job_id = mill.load(store, 8, options=flags)
        claimed = mill.claim(store, mill.session(store))[0]
        expected = SamplingParams(max_tokens=256, temperature=0.0, top_k=7, stop=("x",))
        assert claimed.requests[0].sampling == expected
        assert claimed.requests[0].messages == (
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "prompt 0"},
        )
        job = store.jobs.job(job_id)
        assert SamplingParams.from_json(job.sampling or {}) == expected
        assert job.versions == {"batchmill": "1", "torch": "2"}


class TestSaving:
    def test_outputs_counts_and_runs_of_a_whole_job(self, store: Store) -> None:
        job_id = mill.load(store, 10)
        who = mill.session(store)
        assert mill.work_off(store, who) == 10
        job, effort = store.jobs.job(job_id), store.usage.of(job_id)
        assert job.state is JobState.COMPLETED
        assert (job.counts.total, job.counts.succeeded, job.counts.pending) == (10, 10, 0)
        assert (job.counts.prompt_tokens, job.counts.completion_tokens) == (20, 30)
        assert outputs_of(store, job_id) == list(range(10))
        assert effort.runs == 3
        assert effort.memory.peak_allocated_bytes > 200
        assert effort.memory.device_total_bytes == 1_000
        assert effort.model_load_seconds == 0.5

    def test_an_output_is_saved_once_however_often_it_is_said(self, store: Store) -> None:
        job_id = mill.load(store, 4)
        who = mill.session(store)
        (claimed,) = mill.claim(store, who)
        half = mill.answered(claimed, count=2)
        mill.save(store, who, [half])
        mill.save(store, who, [half])
        other_text = BatchReport(claimed.lease, outputs=[mill.output(job_id, 0, text="another")])
        mill.save(store, who, [other_text])
        counts = store.jobs.job(job_id).counts
        assert (counts.succeeded, counts.prompt_tokens) == (2, 4)
        page = next(store.jobs.output_pages(job_id, states=ALL, page=10))
        assert '"answer 0"' in page[0].payload

    def test_timings_and_every_choice_are_kept(self, store: Store) -> None:
        job_id = mill.load(store, 2)
        who = mill.session(store)
        (claimed,) = mill.claim(store, who)
        choices = (Choice("a", "stop", {"content": []}), Choice("b", "length"))
        timed = Output(RequestKey(job_id, 0), choices, 2, 6, timings=Timings(0.0, 0.25, 1.5))
        mill.save(store, who, [BatchReport(claimed.lease, outputs=[timed, mill.output(job_id, 1)])])
        ((one, other),) = store.jobs.output_pages(job_id, states=frozenset(RequestState), page=10)
        assert (one.queued_seconds, one.prefill_seconds, one.decode_seconds) == (0.0, 0.25, 1.5)
        assert one.payload == timed.payload_text()
        assert (other.queued_seconds, other.prefill_seconds, other.decode_seconds) == (None, None, None)

    def test_the_jobs_template_variables_reach_every_claim(self, store: Store) -> None:
        mill.load(store, 2, batch_size=1, options=GenerationOptions(chat_template_kwargs={"enable_thinking": False}))
        for name in ("first", "second"):
            (claimed,) = mill.claim(store, mill.session(store, name=name))
            assert claimed.requests[0].chat_template_kwargs == {"enable_thinking": False}

    def test_a_lost_fence_writes_nothing(self, store: Store) -> None:
        job_id = mill.load(store, 4)
        frozen, other = mill.session(store), mill.session(store, name="other")
        (claimed,) = mill.claim(store, frozen)
        mill.save(store, frozen, [mill.answered(claimed, count=1)])
        assert store.recovery.take_back(frozen.worker_id, generation=frozen.generation) == 1
        (again,) = mill.claim(store, other)
        assert [each.index for each in again.requests] == [1, 2, 3]
        turned = mill.save(store, frozen, [mill.answered(claimed)])
        assert turned.lost == {claimed.lease.batch_id}
        assert store.jobs.job(job_id).counts.succeeded == 1
        mill.save(store, other, [mill.answered(again)])
        assert store.jobs.job(job_id).state is JobState.COMPLETED

    def test_a_batch_taken_back_and_claimed_by_the_same_worker_has_a_new_fence(self, store: Store) -> None:
        mill.load(store, 4)
        who = mill.session(store)
        (before,) = mill.claim(store, who, room=0)
        store.recovery.take_back(who.worker_id, generation=who.generation)
        (after,) = mill.claim(store, who)
        assert after.lease.fence == before.lease.fence + 1
        assert mill.save(store, who, [mill.answered(before)]).lost == {before.lease.batch_id}

    def test_what_was_in_flight_when_a_child_died_stays_on_record(self, store: Store) -> None:
        mill.load(store, 4)
        who = mill.session(store)
        (claimed,) = mill.claim(store, who, room=1)
        mill.save(store, who, [mill.answered(claimed, count=1)])
        store.recovery.take_back(who.worker_id, generation=who.generation)
        with store.database.read() as connection:
            run = connection.execute(select(runs.c.outcome, runs.c.in_flight)).one()
        assert run.outcome == RunOutcome.CRASHED
        assert run.in_flight == "[1, 2, 3]"

    def test_error_codes_are_kept_with_the_run(self, store: Store) -> None:
        mill.load(store, 4)
        who = mill.session(store)
        (claimed,) = mill.claim(store, who)
        mill.save(store, who, [mill.answered(claimed, count=1, error=ErrorCode.OUT_OF_MEMORY)])
        mill.save(store, who, [mill.answered(claimed, error=ErrorCode.ENGINE_ERROR)])  # says the first one again
        with store.database.read() as connection:
            assert connection.scalar(select(runs.c.error_codes)) == '{"out_of_memory": 1, "engine_error": 3}'

    def test_drain_is_read_back_and_hands_everything_back(self, store: Store) -> None:
        job_id = mill.load(store, 4)
        who = mill.session(store)
        (claimed,) = mill.claim(store, who)
        store.registration.enter(who.worker_id, draining())
        half = mill.answered(claimed, count=2)
        turned = store.leases.sync(who, [half], wanted_requests=10, in_flight_room=10)
        assert turned.drain
        assert turned.claimed == ()
        released = store.leases.sync(who, [BatchReport(claimed.lease, release=True)])
        assert released.released == {claimed.lease.batch_id}
        (again,) = mill.claim(store, mill.session(store, name="other"))
        assert [each.index for each in again.requests] == [2, 3]
        assert store.jobs.job(job_id).counts.succeeded == 2


def draining() -> WorkerState:
    return WorkerState.DRAINING


class TestRecovery:
    def test_a_renewed_lease_is_not_reaped(self, clocked: Store, clock: mill.Clock) -> None:
        mill.load(clocked, 4)
        who = mill.session(clocked)
        (claimed,) = mill.claim(clocked, who)
        clock.seconds += 61
        expired = clocked.recovery.expired(lease_seconds=mill.LEASE_SECONDS)
        assert set(expired) == {claimed.lease.batch_id}
        mill.save(clocked, who, [BatchReport(claimed.lease)])
        assert clocked.recovery.reap(expired) == 0
        clock.seconds += 61
        assert clocked.recovery.expired(lease_seconds=mill.LEASE_SECONDS, for_seconds=30) == {}
        assert clocked.recovery.reap(clocked.recovery.expired(lease_seconds=mill.LEASE_SECONDS)) == 1
        assert mill.save(clocked, who, [BatchReport(claimed.lease)]).lost == {claimed.lease.batch_id}

    def test_a_lease_further_ahead_than_any_can_be_is_over(self, clocked: Store, clock: mill.Clock) -> None:
        """The database's clock was an hour fast, and is set right."""
        mill.load(clocked, 8)
        loading, who, other = mill.begin(clocked), mill.session(clocked), mill.session(clocked, name="other")
        (claimed,) = mill.claim(clocked, who)
        assert clocked.recovery.expired(lease_seconds=60) == clocked.creation.expired(lease_seconds=60) == {}
        clock.seconds -= 3_600
        assert clocked.workers.rows() == []
        assert set(clocked.recovery.expired(lease_seconds=60)) == {claimed.lease.batch_id}
        assert set(clocked.creation.expired(lease_seconds=60)) == {loading}
        clocked.registration.heartbeat(other.worker_id, beat=5.0)  # who lives says so by the new time
        assert [row.name for row in clocked.workers.rows()] == ["other"]
        mill.save(clocked, who, [BatchReport(claimed.lease)])
        clocked.creation.renew(loading, lease_seconds=60)
        assert clocked.recovery.expired(lease_seconds=60) == clocked.creation.expired(lease_seconds=60) == {}

    def test_pending_batches_by_spec_are_bounded(self, store: Store) -> None:
        mill.load(store, 40)
        assert {spec: len(ids) for spec, ids in store.recovery.pending(most=6).items()} == {mill.ECHO_SPEC.canonical: 6}
        mill.work_off(store, mill.session(store))
        assert store.recovery.pending(most=6) == {}


class TestReading:
    def test_jobs_are_found_by_id_prefix_and_last(self, store: Store) -> None:
        first, second = mill.load(store, 1), mill.load(store, 1)
        with store.database.write() as connection:
            connection.execute(update(jobs).where(jobs.c.id == first).values(queued_at=1.0))
        assert store.jobs.find("last") == second
        assert store.jobs.find(first[:7]) == first
        assert store.jobs.find(second.upper()) == second
        with pytest.raises(NotFound, match="no job begins"):
            store.jobs.find("zzzzzzzzz")
        with pytest.raises(NotFound, match="several jobs"):
            store.jobs.find("")

    def test_a_job_is_resumed_by_its_fingerprint_unless_cancelled(self, store: Store) -> None:
        job_id = mill.load(store, 4, fingerprint="same")
        assert store.jobs.resumable("same") == [store.jobs.job(job_id)]
        assert store.jobs.resumable("other") == []
        store.closing.cancel(job_id)
        assert store.jobs.resumable("same") == []

    def test_running_seconds_are_the_union_of_the_runs(self, clocked: Store, clock: mill.Clock) -> None:
        job_id = mill.load(clocked, 12)
        assert clocked.usage.of(job_id).queued_seconds == 0.0
        clock.seconds += 10
        assert clocked.usage.of(job_id).queued_seconds == 10.0
        sessions = [mill.session(clocked, name=name) for name in "ab"]
        (first,) = mill.claim(clocked, sessions[0])  # open for 100 s
        clock.seconds += 40
        (second,) = mill.claim(clocked, sessions[1])  # open for 20 s within the first
        clock.seconds += 20
        mill.save(clocked, sessions[1], [mill.answered(second)])
        clock.seconds += 40
        mill.save(clocked, sessions[0], [mill.answered(first)])
        clock.seconds += 1000  # nobody works
        (third,) = mill.claim(clocked, sessions[0])
        clock.seconds += 5
        clocked.registration.heartbeat(sessions[0].worker_id, beat=5.0)
        effort = clocked.usage.of(job_id)
        assert (effort.queued_seconds, effort.running_seconds) == (10.0, 105.0)
        assert effort.recent_requests_per_second == 0.0
        mill.save(clocked, sessions[0], [mill.answered(third, count=3)])
        assert clocked.usage.of(job_id).recent_requests_per_second == pytest.approx(3 / 5)
