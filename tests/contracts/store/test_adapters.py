"""Adapters in the store: gathered into batches, claimed by who holds them, one meaning for each name of a job."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import select

from batchmill.jobs.errors import StoreBusy, UsageError
from batchmill.jobs.models.adapters import Adapter
from batchmill.jobs.models.spec import ModelSpec
from batchmill.jobs.requests.request import ErrorCode, RequestKey
from batchmill.jobs.requests.states import JobState, RequestState, RunOutcome, WorkerState
from batchmill.jobs.store.leases.lease import BatchReport, Claimed, WorkerSession
from batchmill.jobs.store.store import Store
from batchmill.jobs.store.tables import batches, requests
from tests.support.store import mill
from tests.support.store.oracle import violations
from tests.support.store.races import at_once

A, B = Adapter("a", "/adapters/a"), Adapter("b", "org/b", "main")
OTHER_A, OTHER_B = Adapter("a", "/adapters/newer"), Adapter("b", "org/b", "newer")
ALL = frozenset(RequestState)


@pytest.fixture
def store(clocked: Store) -> Iterator[Store]:
    yield clocked
    assert violations(clocked, closed=False) == []


def gathered(store: Store, job_id: str) -> list[tuple[str, list[int]]]:
    """The adapter of each batch that holds requests, and their indexes."""
    found = (
        select(batches.c.id, batches.c.adapter, requests.c.index)
        .join_from(batches, requests, requests.c.batch_id == batches.c.id)
        .where(batches.c.job_id == job_id)
        .order_by(batches.c.id, requests.c.index)
    )
    by_batch: dict[int, tuple[str, list[int]]] = {}
    with store.database.read() as connection:
        rows: Any = connection.execute(found).all()
    for batch_id, adapter, index in rows:
        by_batch.setdefault(batch_id, (adapter, []))[1].append(index)
    return list(by_batch.values())


def claimed_by(store: Store, who: WorkerSession, *, wanted: int = 1) -> list[str | None]:
    """The adapters of all batches that a worker can claim; each batch is answered at once."""
    got: list[str | None] = []
    while claimed := mill.claim(store, who, wanted=wanted):
        got += [each.adapter for each in claimed]
        assert {request.adapter for each in claimed for request in each.requests} == {each.adapter for each in claimed}
        mill.save(store, who, [mill.answered(each) for each in claimed])
    return got


class TestLoading:
    def test_requests_are_gathered_by_adapter_across_pages(self, store: Store) -> None:
        job_id = mill.begin(store)
        for first, names in ((0, "abab-"), (5, "a-abb"), (10, "aa-a")):
            page = mill.named(*(None if each == "-" else each for each in names), first=first)
            assert store.creation.add(job_id, prompts=page, batch_size=3, lease_seconds=60) == []
        assert gathered(store, job_id) == [
            ("", [4, 6, 12]),
            ("a", [0, 2, 5]),
            ("b", [1, 3, 8]),
            ("a", [7, 10, 11]),
            ("b", [9]),
            ("a", [13]),
        ]

    def test_a_duplicate_of_one_adapter_does_not_move_the_rest(self, store: Store) -> None:
        job_id = mill.begin(store)
        page = mill.named("a", "b", "a", None, "b")
        page[2] = replace(page[2], custom_id="request-0")
        (found,) = store.creation.add(job_id, prompts=page, batch_size=2, lease_seconds=60)
        assert (found.index, found.first_index) == (2, 0)
        assert gathered(store, job_id) == [("", [3]), ("a", [0]), ("b", [1, 4])]

    def test_outputs_stay_in_file_order(self, store: Store) -> None:
        job_id = mill.load_named(store, "b", None, "a", "b", None, "a")
        assert sorted(map(str, claimed_by(store, mill.session(store, adapters=[A, B])))) == ["None", "a", "b"]
        (page,) = store.jobs.output_pages(job_id, states=ALL, page=10)
        assert [row.index for row in page] == list(range(6))
        assert store.jobs.job(job_id).state is JobState.COMPLETED


class TestClaiming:
    def test_a_worker_gets_what_it_holds_and_what_needs_nothing(self, store: Store) -> None:
        mill.load_named(store, "a", "b", None)
        assert claimed_by(store, mill.session(store, adapters=[B])) == [None, "b"]
        assert claimed_by(store, mill.session(store)) == []
        assert claimed_by(store, mill.session(store, adapters=[A])) == ["a"]

    def test_the_oldest_job_comes_first_whatever_it_needs(self, store: Store, clock: mill.Clock) -> None:
        for names in (("b", "a"), (None,), ("a",)):
            mill.load_named(store, *names)
            clock.seconds += 1
        assert claimed_by(store, mill.session(store, adapters=[A, B])) == ["a", "b", None, "a"]

    def test_many_batches_that_nobody_here_can_take_hide_nothing(self, store: Store) -> None:
        mill.load_named(store, *["a"] * 600, None, batch_size=1)
        who = mill.session(store)
        assert claimed_by(store, who) == [None]

    def test_a_worker_bound_to_a_job_takes_its_adapters_alone(self, store: Store) -> None:
        mill.load_named(store, "a")
        mine = mill.load_named(store, "a", "b")
        who = mill.session(store, only_job=mine, adapters=[A, B])
        assert [mill.claim(store, who)[0].lease.job_id for _ in range(2)] == [mine, mine]
        assert mill.claim(store, who) == ()


class TestReadingAhead:
    def test_only_idle_workers_that_hold_the_adapter_are_left_a_batch(self, store: Store) -> None:
        mill.load_named(store, *["a"] * 3, batch_size=1)
        who = mill.session(store, adapters=[A])
        mill.session(store, name="idle without it", adapters=[B])
        first = mill.claim(store, who, wanted=2)
        assert len(first) == 2
        mill.session(store, name="idle with it", adapters=[A])
        assert store.leases.sync(who, [BatchReport(each.lease) for each in first], wanted_requests=9).claimed == ()

    def test_what_an_idle_worker_could_start_is_left_and_the_next_is_read_ahead(self, store: Store) -> None:
        mill.load_named(store, None, None, "a", "a", batch_size=1)
        who = mill.session(store, adapters=[A])
        mill.session(store, name="idle")
        assert [each.adapter for each in mill.claim(store, who, wanted=9)] == [None, "a", "a"]

    def test_an_untouched_batch_goes_to_an_idle_worker_that_holds_its_adapter(self, store: Store) -> None:
        mill.load_named(store, "a", "a", "b", "b", batch_size=1)
        who = mill.session(store, adapters=[A, B])
        first, *rest = mill.claim(store, who, wanted=9)
        held = [BatchReport(first.lease, in_flight=[first.requests[0].index])]
        held += [BatchReport(each.lease, untouched=True) for each in rest]
        plain = mill.session(store, name="idle without any")
        assert store.leases.sync(who, held).released == frozenset()
        idle = mill.session(store, name="idle", adapters=[A])
        (given,) = [each for each in rest if each.adapter == "a"]
        assert store.leases.sync(who, held).released == {given.lease.batch_id}
        assert mill.claim(store, plain) == ()
        assert mill.claim(store, idle)[0].lease.batch_id == given.lease.batch_id

    def test_nothing_is_handed_over_to_who_finds_something_pending(self, store: Store) -> None:
        mill.load_named(store, *["a"] * 3, None, batch_size=1)
        who = mill.session(store, adapters=[A])
        first, second, third = mill.claim(store, who, wanted=3)
        mill.session(store, name="idle", adapters=[A])
        held = [
            BatchReport(first.lease, in_flight=[3]),
            BatchReport(second.lease, untouched=True),
            BatchReport(third.lease, untouched=True),
        ]
        assert store.leases.sync(who, held).released == frozenset()


class TestMoving:
    def test_a_retry_keeps_every_request_with_its_adapter(self, store: Store) -> None:
        job_id = mill.load_named(store, "a", None, "a", "b", None, "b")
        mill.work_off(store, mill.session(store, adapters=[A, B]), error=ErrorCode.ENGINE_ERROR)
        assert store.retries.retry(job_id).moved == 6
        assert gathered(store, job_id) == [("", [1, 4]), ("a", [0, 2]), ("b", [3, 5])]

    def test_suspects_stay_with_their_adapter(self, store: Store) -> None:
        job_id = mill.load_named(store, *["a"] * 20, batch_size=20)
        who = mill.session(store, adapters=[A])
        mill.claim(store, who)
        store.recovery.take_back(who.worker_id, generation=who.generation)
        assert [(adapter, len(each)) for adapter, each in gathered(store, job_id)] == [("a", 16), ("a", 4)]
        plain = mill.session(store, name="plain")
        assert mill.claim(store, plain) == ()
        (apart,) = mill.claim(store, mill.session(store, name="next", adapters=[A]), wanted=99)
        assert (apart.lease.apart, apart.adapter) == (True, "a")

    def test_suspects_that_a_worker_cannot_take_do_not_stop_it(self, store: Store) -> None:
        mill.load_named(store, "a", None)
        crashing = mill.session(store, adapters=[A])
        mill.save(store, crashing, [mill.answered(each) for each in mill.claim(store, crashing)])
        assert mill.claim(store, crashing)[0].adapter == "a"
        store.recovery.take_back(crashing.worker_id, generation=crashing.generation)
        store.registration.enter(crashing.worker_id, WorkerState.STOPPED)
        mill.load_named(store, None)
        assert claimed_by(store, mill.session(store, name="plain")) == [None]


class TestMeanings:
    def test_a_live_worker_keeps_a_name_from_meaning_something_else(self, store: Store, clock: mill.Clock) -> None:
        mill.session(store, name="one", adapters=[A, B])
        mill.session(store, name="same", adapters=[A])
        with pytest.raises(UsageError) as refused:
            mill.session(store, name="two", adapters=[B, OTHER_A])
        assert str(refused.value) == (
            "the adapter 'a' is /adapters/a at worker one on host (last seen 0 s ago), and /adapters/newer was asked"
            " for here: stop that worker, or choose another name"
        )
        assert len(store.workers.rows()) == 2
        mill.session(store, name="another model", adapters=[OTHER_A], spec=ModelSpec("org/llama"))
        clock.seconds += 21
        mill.session(store, name="two", adapters=[OTHER_A])  # the others are dead by now

    def test_a_worker_that_gave_up_or_stopped_keeps_no_name(self, store: Store) -> None:
        for state in (WorkerState.SICK, WorkerState.FAILED, WorkerState.STOPPED):
            store.registration.enter(mill.session(store, adapters=[A]).worker_id, state)
        assert mill.session(store, adapters=[OTHER_A])

    def test_of_two_meanings_that_register_at_once_one_is_refused(self, store: Store) -> None:
        def register(adapter: Adapter) -> int:
            try:
                return mill.session(store, adapters=[adapter]).worker_id
            except UsageError:
                return 0

        chance = random.Random(5)
        for _ in range(20):
            won = at_once(chance, lambda: register(A), lambda: register(OTHER_A), lambda: register(A))
            held = {each.adapters for each in store.workers.rows()}
            assert len(held) == 1
            assert sum(map(bool, won)) == len(store.workers.rows())
            for each in filter(None, won):
                store.registration.enter(each, WorkerState.STOPPED)

    def test_the_workers_row_says_what_it_holds(self, store: Store) -> None:
        mill.session(store, adapters=[A, B])
        assert [each.adapters for each in store.workers.rows()] == [(A, B)]

    def test_a_job_keeps_the_meaning_that_its_first_batch_was_run_with(self, store: Store, clock: mill.Clock) -> None:
        job_id = mill.load_named(store, "a", "a", None, batch_size=1)
        first = mill.session(store, adapters=[A])
        assert [each.adapter for each in mill.claim(store, first)] == [None]
        assert [each.adapter for each in mill.claim(store, first)] == ["a"]
        assert store.jobs.job(job_id).adapters == (A,)
        clock.seconds += 100
        store.recovery.take_back(first.worker_id, generation=first.generation, outcome=RunOutcome.RELEASED)
        later = mill.load_named(store, "a")
        newer = mill.session(store, name="newer", adapters=[OTHER_A])
        got = [mill.claim(store, newer)[0].lease.job_id for _ in range(2)]
        assert got == [job_id, later]  # of the first job only what needs no adapter
        assert mill.claim(store, newer) == ()
        assert [each.adapters for each in map(store.jobs.job, (job_id, later))] == [(A,), (OTHER_A,)]

    def test_another_meaning_of_a_name_keeps_no_worker_from_the_other_batches(
        self, store: Store, clock: mill.Clock
    ) -> None:
        job_id = mill.load_named(store, "a", "b", batch_size=1)
        first = mill.session(store, adapters=[B])
        assert [each.adapter for each in mill.claim(store, first)] == ["b"]
        clock.seconds += 100
        store.recovery.take_back(first.worker_id, generation=first.generation, outcome=RunOutcome.RELEASED)
        newer = mill.session(store, name="newer", adapters=[A, OTHER_B])
        assert [each.adapter for each in mill.claim(store, newer)] == ["a"]
        assert set(store.jobs.job(job_id).adapters) == {A, B}

    def test_of_two_meanings_that_begin_a_job_at_once_one_runs_it(self, store: Store, clock: mill.Clock) -> None:
        """A worker that was taken for dead comes back beside the one that took its name."""
        revenant = mill.session(store, name="old", adapters=[A])
        clock.seconds += 100
        newer = mill.session(store, name="new", adapters=[OTHER_A])
        store.registration.heartbeat(revenant.worker_id, beat=5)
        chance = random.Random(7)

        def claim(who: WorkerSession) -> tuple[Claimed, ...]:
            try:
                return mill.claim(store, who)
            except StoreBusy:
                return ()  # the saver turns again

        for _ in range(30):
            job_id = mill.load_named(store, "a", "a", batch_size=1)
            got = at_once(chance, lambda: claim(revenant), lambda: claim(newer))
            by = [who for who, claimed in zip((revenant, newer), got, strict=True) if claimed]
            assert len(by) == 1
            assert store.jobs.job(job_id).adapters == by[0].adapters
            mill.save(store, by[0], [mill.answered(*got[by[0] is newer])])
            mill.work_off(store, by[0])
            assert store.jobs.job(job_id).state is JobState.COMPLETED


class TestWakeups:
    def test_only_what_a_live_worker_could_take_is_worth_a_wake_up(self, store: Store, clock: mill.Clock) -> None:
        mill.load_named(store, "a", "b", "b", None, batch_size=1)
        spec = mill.ECHO_SPEC

        def counted() -> tuple[int, int]:
            return len(store.recovery.pending_of(spec, most=9)), len(store.recovery.pending(most=9)[spec.canonical])

        assert counted() == (1, 1)
        mill.session(store, adapters=[B], ready=False)
        assert counted() == (3, 3)
        other = mill.session(store, adapters=[A])
        assert len(store.recovery.pending_of(spec, most=9, worker_id=other.worker_id)) == 2
        clock.seconds += 21
        assert counted() == (1, 1)


def test_an_unanswered_request_of_a_lost_worker_is_written_once(store: Store) -> None:
    """The fence is the adapter batches' too: who lost one writes nothing, though its adapter is the same."""
    job_id = mill.load_named(store, "a")
    lost, next_one = (mill.session(store, name=name, adapters=[A]) for name in ("lost", "next"))
    (claimed,) = mill.claim(store, lost)
    store.recovery.take_back(lost.worker_id, generation=lost.generation, outcome=RunOutcome.RELEASED)
    (again,) = mill.claim(store, next_one)
    late = replace(mill.answered(claimed), outputs=[mill.output(job_id, 0, text="late")])
    assert mill.save(store, lost, [late]).lost == {claimed.lease.batch_id}
    mill.save(store, next_one, [mill.answered(again)])
    ((row,),) = store.jobs.output_pages(job_id, states=ALL, page=5)
    assert RequestKey(job_id, row.index) == RequestKey(job_id, 0)
    assert "late" not in row.payload
