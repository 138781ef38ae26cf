"""Blame for a crash: suspects run apart, in groups of 16, 4, 1 and 1; innocents are let go."""

from __future__ import annotations

import pytest
from sqlalchemy import select

from batchmill.jobs.requests.request import ErrorCode
from batchmill.jobs.requests.states import JobState, RequestState, RunOutcome, WorkerState
from batchmill.jobs.store.leases.blame import SUSPECT_GROUPS
from batchmill.jobs.store.leases.lease import Claimed, WorkerSession
from batchmill.jobs.store.store import Store
from batchmill.jobs.store.tables import batches
from tests.support.store import mill
from tests.support.store.oracle import violations


def crash(store: Store, who: WorkerSession) -> None:
    store.recovery.take_back(who.worker_id, generation=who.generation)


def indexes(claimed: Claimed) -> list[int]:
    return [each.index for each in claimed.requests]


def suspects(store: Store) -> dict[int, int]:
    """The number of pending batches by their number of crashes."""
    with store.database.read() as connection:
        of_batches = connection.scalars(select(batches.c.crashes).where(batches.c.state == "pending")).all()
    return {crashes: of_batches.count(crashes) for crashes in set(of_batches)}


def errors(store: Store, job_id: str) -> dict[int, str | None]:
    states = frozenset({RequestState.FAILED})
    return {
        row.index: row.error_code for page in store.jobs.output_pages(job_id, states=states, page=100) for row in page
    }


def work_off(store: Store, who: WorkerSession, poison: set[int]) -> int:
    """Works as a child does that dies on these prompts, and is replaced: how often it died."""
    crashes = 0
    while claimed := mill.claim(store, who, wanted=64, room=80):
        in_engine = [index for each in claimed for index in indexes(each)[: each.in_flight]]
        if poison.intersection(in_engine):
            crashes += 1
            crash(store, who)
        else:
            mill.save(store, who, [mill.answered(each) for each in claimed])
    return crashes


def test_what_was_in_flight_runs_apart_at_once_and_the_rest_goes_on(store: Store) -> None:
    job_id = mill.load(store, 128, batch_size=64)
    who, busy = mill.session(store), mill.session(store, name="busy")
    mill.claim(store, who, room=20)
    (held,) = mill.claim(store, busy)
    crash(store, who)
    turned = store.leases.sync(busy, [mill.answered(held, count=9)], wanted_requests=1_000, in_flight_room=100)
    (rest,) = turned.claimed  # who is at work goes on with the rest, and stops before the suspects
    assert indexes(rest) == list(range(20, 64))
    assert not rest.lease.apart
    groups = []
    while claimed_now := mill.claim(store, who, wanted=1_000):
        (group,) = claimed_now  # never two at once
        assert group.lease.apart
        groups.append(indexes(group))
        mill.save(store, who, [mill.answered(group)])
    assert groups == [list(range(16)), [16, 17, 18, 19]]
    mill.save(store, busy, [mill.answered(held), mill.answered(rest)])
    assert store.jobs.job(job_id).state is JobState.COMPLETED
    assert violations(store) == []


def test_a_worker_that_holds_something_claims_no_suspects_and_nothing_past_them(store: Store) -> None:
    mill.load(store, 6, batch_size=2)
    mill.load(store, 8, batch_size=4)
    who, dead = mill.session(store), mill.session(store, name="dead")
    (first,) = mill.claim(store, who)
    mill.claim(store, dead)
    crash(store, dead)
    store.registration.enter(dead.worker_id, WorkerState.STOPPED)
    turned = store.leases.sync(who, [mill.answered(first, count=1)], wanted_requests=100, in_flight_room=100)
    (third,) = turned.claimed  # the rest of its job; then come the suspects, and nothing past them
    assert indexes(third) == [4, 5]
    held = [mill.answered(first), mill.answered(third)]
    (suspect,) = store.leases.sync(who, held, wanted_requests=100, in_flight_room=100).claimed
    assert suspect.lease.apart
    held = [mill.answered(suspect, count=1)]
    assert store.leases.sync(who, held, wanted_requests=100, in_flight_room=100).claimed == ()
    held = [mill.answered(suspect)]
    assert len(store.leases.sync(who, held, wanted_requests=100, in_flight_room=100).claimed) == 2


@pytest.mark.parametrize("poison", [{0}, {63}, {40}])
def test_one_poison_prompt_costs_five_crashes_and_nobody_else(store: Store, poison: set[int]) -> None:
    job_id = mill.load(store, 200, batch_size=64)
    assert work_off(store, mill.session(store), poison) == 5
    assert errors(store, job_id) == dict.fromkeys(poison, ErrorCode.POISON)
    job = store.jobs.job(job_id)
    assert job.state is JobState.COMPLETED
    assert (job.counts.succeeded, job.counts.failed) == (199, 1)
    assert violations(store) == []


def test_three_poison_prompts_among_a_thousand_cost_at_most_fifteen(store: Store) -> None:
    job_id = mill.load(store, 1_000, batch_size=64)
    poison = {3, 5, 700}
    assert 5 < work_off(store, mill.session(store), poison) <= 15
    assert errors(store, job_id) == dict.fromkeys(poison, ErrorCode.POISON)
    assert violations(store) == []


def test_poison_as_the_last_request_closes_the_job(store: Store) -> None:
    job_id = mill.load(store, 1)
    assert work_off(store, mill.session(store), {0}) == 5
    assert store.jobs.job(job_id).state is JobState.COMPLETED


def test_a_retry_gives_poison_another_five_lives(store: Store) -> None:
    job_id = mill.load(store, 3)
    who = mill.session(store)
    work_off(store, who, {1})
    store.retries.retry(job_id)
    assert suspects(store) == {0: 1}
    assert work_off(store, who, set()) == 0
    assert store.jobs.job(job_id).counts.succeeded == 3
    assert violations(store) == []


def test_a_release_and_an_expired_lease_are_no_crashes(clocked: Store, clock: mill.Clock) -> None:
    job_id = mill.load(clocked, 20, batch_size=20)
    who = mill.session(clocked)
    mill.claim(clocked, who)
    clocked.recovery.take_back(who.worker_id, generation=who.generation, outcome=RunOutcome.RELEASED)
    assert suspects(clocked) == {0: 1}
    for _ in range(len(SUSPECT_GROUPS) + 2):  # a laptop that sleeps for longer than a lease, night after night
        mill.claim(clocked, who)
        clock.seconds += mill.LEASE_SECONDS + 1
        assert clocked.recovery.reap(clocked.recovery.expired(lease_seconds=mill.LEASE_SECONDS)) == 1
        assert suspects(clocked) == {0: 1}
    assert mill.work_off(clocked, who) == 20
    assert errors(clocked, job_id) == {}
    assert violations(clocked) == []


def test_a_suspect_whose_lease_expires_stays_one(clocked: Store, clock: mill.Clock) -> None:
    mill.load(clocked, 1)
    who = mill.session(clocked)
    mill.claim(clocked, who)
    crash(clocked, who)
    mill.claim(clocked, who)
    clock.seconds += mill.LEASE_SECONDS + 1
    clocked.recovery.reap(clocked.recovery.expired(lease_seconds=mill.LEASE_SECONDS))
    assert suspects(clocked) == {1: 1}


def test_suspects_of_a_cancelled_job_are_cancelled(store: Store) -> None:
    job_id = mill.load(store, 20, batch_size=20)
    who = mill.session(store)
    mill.claim(store, who)
    store.closing.cancel(job_id)
    crash(store, who)
    store.closing.close_finished()
    job = store.jobs.job(job_id)
    assert job.state is JobState.CANCELLED
    assert job.counts.cancelled == 20
    assert violations(store) == []


def test_a_zombie_writes_nothing_for_requests_that_moved(store: Store) -> None:
    job_id = mill.load(store, 4, batch_size=4)
    zombie, other = mill.session(store), mill.session(store, name="other")
    (claimed,) = mill.claim(store, zombie)
    crash(store, zombie)
    assert mill.save(store, zombie, [mill.answered(claimed)]).lost == {claimed.lease.batch_id}
    assert store.jobs.job(job_id).counts.succeeded == 0
    assert mill.work_off(store, other) == 4
    assert violations(store) == []


def test_leases_that_a_lost_answer_brought_are_handed_back(store: Store) -> None:
    mill.load(store, 8, batch_size=4)
    who = mill.session(store)
    (known,) = mill.claim(store, who)
    store.leases.sync(who, [mill.answered(known, count=0)], wanted_requests=8, in_flight_room=8)  # its answer is lost
    turned = store.leases.sync(who, [mill.answered(known)], wanted_requests=8, in_flight_room=8, resumed=True)
    (again,) = turned.claimed
    assert indexes(again) == [4, 5, 6, 7]
    assert not again.lease.apart
    mill.save(store, who, [mill.answered(again)])
    assert violations(store) == []
