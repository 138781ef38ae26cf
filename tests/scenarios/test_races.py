"""Races of threads that begin at the same moment on one store, on SQLite and on PostgreSQL.

Every test repeats its race for a few seconds (longer in the slow run): each round begins with nothing open, lets
everybody go at one barrier, and then looks at what is in the store. Which of them won is left to the database.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator

import pytest
from sqlalchemy import select

from batchmill.jobs.requests.states import JobState, RunOutcome
from batchmill.jobs.store.leases.lease import BatchReport, WorkerSession
from batchmill.jobs.store.store import Store
from batchmill.jobs.store.tables import batches, jobs
from tests.support.store import mill
from tests.support.store.oracle import violations
from tests.support.store.races import (
    Rounds,
    at_once,
    crash_counts,
    crashed_runs,
    finish_off,
    open_under,
    outcomes,
    retried,
    rounds_for,
    state_of,
    written_by,
)

_LEASE_OVER = mill.LEASE_SECONDS + 1


@pytest.fixture(params=[pytest.param(1.0, id="short"), pytest.param(8.0, id="long", marks=pytest.mark.slow)])
def rounds(request: pytest.FixtureRequest) -> Rounds:
    """Rounds until the time is up; each gets the same stream of chance."""
    return rounds_for(request.param)


@pytest.fixture
def store(store_url: str, clock: mill.Clock) -> Iterator[Store]:
    store = Store(store_url, busy_seconds=20, now=clock.expression())
    yield store
    store.close()


class TestFinishing:
    def test_the_last_two_batches_at_once_close_the_job(self, store: Store, rounds: Rounds) -> None:
        sessions = [mill.session(store, name=name) for name in "ab"]
        for chance in rounds:
            job_id = mill.load(store, 2, batch_size=1)
            held = [mill.answered(mill.claim(store, who)[0]) for who in sessions]
            at_once(
                chance,
                lambda held=held: mill.save(store, sessions[0], [held[0]]),
                lambda held=held: mill.save(store, sessions[1], [held[1]]),
            )
            assert state_of(store, job_id) is JobState.COMPLETED
        assert violations(store) == []

    def test_a_job_that_worker_and_reconcilers_close_at_once_is_closed_once(self, store: Store, rounds: Rounds) -> None:
        who = mill.session(store)
        for chance in rounds:
            job_id = mill.load(store, 1)
            (claimed,) = mill.claim(store, who)
            mill.save(store, who, [mill.answered(claimed)])
            with store.database.write() as connection:  # as if the worker had died before it closed the job
                connection.execute(
                    jobs.update().where(jobs.c.id == job_id).values(state=JobState.RUNNING.value, finished_at=None)
                )
            closed = at_once(chance, *[store.closing.close_finished] * 3)
            assert sorted(closed) == [[], [], [job_id]]
        assert violations(store) == []

    def test_a_crash_beside_the_last_finish_leaves_the_job_open(self, store: Store, rounds: Rounds) -> None:
        """The suspects' new batches are seen by who finishes the other batch at the same moment."""
        sessions = [mill.session(store, name=name) for name in "ab"]
        for chance in rounds:
            job_id = mill.load(store, 4, batch_size=2)
            held = [mill.answered(mill.claim(store, who)[0]) for who in sessions]
            at_once(
                chance,
                lambda held=held: mill.save(store, sessions[0], [held[0]]),
                lambda: store.recovery.take_back(sessions[1].worker_id, generation=sessions[1].generation),
            )
            assert state_of(store, job_id) is JobState.RUNNING
            finish_off(store, sessions[0], job_id)


class TestReaping:
    def test_a_claim_beside_a_reap_gets_a_batch_once_and_with_a_new_fence(
        self, store: Store, clock: mill.Clock, rounds: Rounds
    ) -> None:
        dead, alive = mill.session(store, name="dead"), mill.session(store, name="alive")
        for chance in rounds:
            job_id = mill.load(store, 3)
            (before,) = mill.claim(store, dead, room=chance.choice((0, 2)))
            clock.seconds += _LEASE_OVER
            expired = store.recovery.expired(lease_seconds=mill.LEASE_SECONDS)
            reaped, *claims = at_once(
                chance,
                lambda expired=expired: store.recovery.reap(expired),
                lambda: mill.claim(store, alive),
                lambda: mill.claim(store, alive),
            )
            assert reaped == 1
            got = [each for claim in claims for each in claim]
            assert len(got) == len({each.lease.batch_id for each in got})
            assert all(each.lease.fence == 2 for each in got if each.lease.batch_id == before.lease.batch_id)
            assert mill.save(store, dead, [mill.answered(before)]).lost == {before.lease.batch_id}
            assert violations(store, closed=False) == []
            mill.save(store, alive, [mill.answered(each) for each in got])
            finish_off(store, alive, job_id)
            assert outcomes(store, job_id)[RunOutcome.EXPIRED] == 1

    def test_a_save_beside_a_reap_is_either_whole_and_in_time_or_lost(
        self, store: Store, clock: mill.Clock, rounds: Rounds
    ) -> None:
        frozen, other = mill.session(store, name="frozen"), mill.session(store, name="other")
        for chance in rounds:
            job_id = mill.load(store, 4)
            (claimed,) = mill.claim(store, frozen)
            clock.seconds += _LEASE_OVER
            expired = store.recovery.expired(lease_seconds=mill.LEASE_SECONDS)
            said = mill.answered(claimed, count=chance.choice((2, 4)))
            turned, reaped = at_once(
                chance,
                lambda said=said: mill.save(store, frozen, [said]),
                lambda expired=expired: store.recovery.reap(expired),
            )
            lost = turned.lost == {claimed.lease.batch_id}
            assert lost == (reaped == 1)
            saved = set() if lost else {each.key.index for each in said.outputs}
            assert written_by(store, claimed.lease.run_id) == saved
            if not lost and len(saved) < 4:  # it goes on under the lease that it has renewed
                assert not mill.save(store, frozen, [mill.answered(claimed)]).lost
            finish_off(store, other, job_id)

    def test_nothing_is_saved_under_a_fence_after_the_taking_back(self, store: Store, rounds: Rounds) -> None:
        frozen, other = mill.session(store, name="frozen"), mill.session(store, name="other")
        for chance in rounds:
            job_id = mill.load(store, 6, batch_size=6)
            (claimed,) = mill.claim(store, frozen)
            turned, taken, early = at_once(
                chance,
                lambda claimed=claimed: mill.save(store, frozen, [mill.answered(claimed, count=3)]),
                lambda: store.recovery.take_back(frozen.worker_id, generation=frozen.generation),
                lambda: mill.claim(store, other),
            )
            assert taken == 1
            saved = written_by(store, claimed.lease.run_id)
            assert saved == (set() if turned.lost else {0, 1, 2})
            assert crash_counts(store, job_id) == [0 if index in saved else 1 for index in range(6)]
            assert mill.save(store, frozen, [mill.answered(claimed)]).lost == {claimed.lease.batch_id}
            assert written_by(store, claimed.lease.run_id) == saved
            mill.save(store, other, [mill.answered(each) for each in early])
            finish_off(store, other, job_id)

    def test_three_reconcilers_at_once_reap_once_and_blame_nobody(
        self, store: Store, clock: mill.Clock, rounds: Rounds
    ) -> None:
        sessions = [mill.session(store, name=f"dead {number}") for number in range(3)]
        alive = mill.session(store, name="alive")
        for chance in rounds:
            job_id = mill.load(store, 12, batch_size=4)
            held = [each for who in sessions for each in mill.claim(store, who, room=2)]
            clock.seconds += _LEASE_OVER
            sightings = [store.recovery.expired(lease_seconds=mill.LEASE_SECONDS) for _ in range(3)]
            reaped = at_once(chance, *[lambda seen=seen: store.recovery.reap(seen) for seen in sightings])
            assert sum(reaped) == len(held) == 3
            assert crash_counts(store, job_id) == [0] * 12
            assert outcomes(store, job_id) == {RunOutcome.EXPIRED.value: 3}
            assert violations(store, closed=False) == []
            finish_off(store, alive, job_id)

    def test_a_dead_process_taken_back_twice_at_once_is_blamed_once(
        self, store: Store, clock: mill.Clock, rounds: Rounds
    ) -> None:
        """Batches that a reconciler took back first have expired, which blames nobody."""
        dead, alive = mill.session(store, name="dead"), mill.session(store, name="alive")
        for chance in rounds:
            job_id = mill.load(store, 8, batch_size=2)
            held = mill.claim(store, dead, wanted=4, room=100)
            clock.seconds += _LEASE_OVER
            seen = store.recovery.expired(lease_seconds=mill.LEASE_SECONDS)
            taken = at_once(
                chance,
                lambda: store.recovery.take_back(dead.worker_id, generation=dead.generation),
                lambda: store.recovery.take_back(dead.worker_id, generation=dead.generation),
                lambda seen=seen: store.recovery.reap(seen),
            )
            assert sum(taken) == len(held)
            crashed = crashed_runs(store)
            in_flight = sum(each.in_flight for each in held if each.lease.run_id in crashed)
            assert sorted(crash_counts(store, job_id)) == [0] * (8 - in_flight) + [1] * in_flight
            assert outcomes(store, job_id).total() == len(held)
            finish_off(store, alive, job_id)


class TestClaiming:
    def test_eight_claimers_share_two_hundred_batches(self, store: Store) -> None:
        mill.load(store, 200, batch_size=1)
        sessions = [mill.session(store, name=f"w{number}") for number in range(8)]
        won: Counter[int] = Counter()

        def claim_all(who: WorkerSession) -> None:
            while claimed := mill.claim(store, who):
                won.update(each.lease.batch_id for each in claimed)
                mill.save(store, who, [mill.answered(each) for each in claimed])

        at_once(random.Random(), *[lambda who=who: claim_all(who) for who in sessions])
        assert len(won) == 200
        assert set(won.values()) == {1}
        with store.database.read() as connection:
            assert set(connection.scalars(select(batches.c.fence))) == {1}
            assert connection.scalar(select(jobs.c.state)) == JobState.COMPLETED
        assert violations(store) == []

    def test_suspects_run_apart_however_many_ask(self, store: Store, rounds: Rounds) -> None:
        """Of several workers that ask at once, with and without work, none holds a suspect beside anything else."""
        sessions = [mill.session(store, name=f"w{number}") for number in range(4)]
        for chance in rounds:
            job_id = mill.load(store, 12, batch_size=3)
            first = mill.claim(store, sessions[0], room=2)
            store.recovery.take_back(sessions[0].worker_id, generation=sessions[0].generation)
            asked = at_once(chance, *[lambda who=who: mill.claim(store, who, wanted=6) for who in sessions])
            for claimed in asked:
                assert len(claimed) == 1 or not any(each.lease.apart for each in claimed)
            assert sum(each.lease.apart for claimed in asked for each in claimed) <= 1
            assert len(first) == 1
            for who, claimed in zip(sessions, asked, strict=True):
                mill.save(store, who, [mill.answered(each) for each in claimed])
            finish_off(store, sessions[0], job_id)


class TestOpening:
    def test_of_twenty_submits_with_one_key_one_job_is_opened(self, store: Store, rounds: Rounds) -> None:
        for number, chance in enumerate(rounds):
            key = f"key {number}"
            opened = at_once(chance, *[lambda key=key: open_under(store, key)] * 20)
            holders = {job_id for job_id, _ in opened}
            assert len(holders) == 1
            assert sum(is_mine for _, is_mine in opened) == 1
            with store.database.read() as connection:
                under_key = connection.scalars(select(jobs.c.id).where(jobs.c.idempotency_key == key)).all()
            assert set(under_key) == holders
        assert violations(store, closed=False) == []


class TestCancelling:
    def test_a_cancel_beside_the_last_finish_ends_in_one_of_two_states(self, store: Store, rounds: Rounds) -> None:
        who = mill.session(store)
        for chance in rounds:
            job_id = mill.load(store, 3)
            (claimed,) = mill.claim(store, who)
            said = mill.answered(claimed, count=chance.choice((1, 3)))
            turned, state = at_once(
                chance,
                lambda said=said: mill.save(store, who, [said]),
                lambda job_id=job_id: store.closing.cancel(job_id),
            )
            if not (turned.finished or turned.cancelled):
                turned = mill.save(store, who, [said])
            assert turned.finished or turned.cancelled
            ended = state_of(store, job_id)
            assert ended in (JobState.COMPLETED, JobState.CANCELLED)
            assert state in (ended, JobState.CANCELLING)
            counts = store.jobs.job(job_id).counts
            assert (counts.succeeded, counts.cancelled) == (len(said.outputs), 3 - len(said.outputs))
            assert violations(store) == []

    def test_a_cancel_beside_a_claim_leaves_nothing_open(self, store: Store, rounds: Rounds) -> None:
        who = mill.session(store)
        for chance in rounds:
            job_id = mill.load(store, 6, batch_size=2)
            claimed, _ = at_once(
                chance,
                lambda: mill.claim(store, who, wanted=4),
                lambda job_id=job_id: store.closing.cancel(job_id),
            )
            turned = mill.save(store, who, [BatchReport(each.lease) for each in claimed])
            assert turned.cancelled == {each.lease.batch_id for each in claimed}
            assert state_of(store, job_id) is JobState.CANCELLED
            assert violations(store) == []

    def test_a_cancel_beside_a_crash_leaves_nothing_open(self, store: Store, rounds: Rounds) -> None:
        who = mill.session(store)
        for chance in rounds:
            job_id = mill.load(store, 4, batch_size=2)
            mill.claim(store, who)
            at_once(
                chance,
                lambda: store.recovery.take_back(who.worker_id, generation=who.generation),
                lambda job_id=job_id: store.closing.cancel(job_id),
                store.closing.close_finished,
            )
            store.closing.close_finished()
            assert state_of(store, job_id) is JobState.CANCELLED
            assert violations(store) == []

    def test_two_retries_at_once_move_every_request_once(self, store: Store, rounds: Rounds) -> None:
        who = mill.session(store)
        for chance in rounds:
            job_id = mill.load(store, 5, batch_size=2)
            store.closing.cancel(job_id)
            moved = at_once(chance, *[lambda job_id=job_id: retried(store, job_id)] * 2)
            assert sum(moved) == 5
            assert violations(store, closed=False) == []
            finish_off(store, who, job_id)
