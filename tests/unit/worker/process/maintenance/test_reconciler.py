"""The reconciler's pass: leases that it reaps, jobs that it closes or deletes, and wake-ups that it sends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

from batchmill.jobs.broker.queue_name import queue_name
from batchmill.jobs.errors import BrokerUnavailable
from batchmill.jobs.requests.states import JobState
from batchmill.jobs.store.leases.lease import BatchReport
from batchmill.jobs.store.store import Store
from batchmill.worker.process.maintenance import reconciler as reconciler_module
from batchmill.worker.process.maintenance.reconciler import Reconciler
from tests.support.store import mill


class QueueOfOne:
    """Stands in for Redis: remembers what was sent."""

    def __init__(self) -> None:
        self.sent: dict[str, Sequence[int]] = {}
        self.away = False

    def send_wakeups(self, queue: str, batch_ids: Sequence[int]) -> int:
        if self.away:
            raise BrokerUnavailable("away")
        self.sent[queue] = batch_ids
        return len(batch_ids)


@pytest.fixture
def store(sqlite_url: str, clock: mill.Clock) -> Iterator[Store]:
    store = Store(sqlite_url, now=clock.expression())
    yield store
    store.close()


@pytest.fixture
def own_clock(monkeypatch: pytest.MonkeyPatch) -> mill.Clock:
    """The reconciler's own clock, which no outage of the store stops."""
    own = mill.Clock(0.0)
    monkeypatch.setattr(reconciler_module, "monotonic", lambda: own.seconds)
    return own


def test_a_lease_is_reaped_once_it_was_seen_expired_half_a_lease_apart(
    store: Store, clock: mill.Clock, own_clock: mill.Clock
) -> None:
    job_id = mill.load(store, 4)
    mill.claim(store, mill.session(store))
    queue = QueueOfOne()
    reconciler = Reconciler(store, queue, lease_seconds=60, loading_lease_seconds=60)  # type: ignore[arg-type]
    clock.seconds += 61
    reconciler.repair()
    reconciler.send_wakeups()
    own_clock.seconds += 29
    reconciler.repair()
    reconciler.send_wakeups()
    assert queue.sent == {}
    own_clock.seconds += 1
    reconciler.repair()
    reconciler.send_wakeups()
    assert list(queue.sent) == [queue_name(mill.ECHO_SPEC, store.id)]
    assert store.jobs.job(job_id).counts.pending == 4


def test_an_outage_of_the_store_reaps_nobody(store: Store, clock: mill.Clock, own_clock: mill.Clock) -> None:
    mill.load(store, 4)
    who = mill.session(store)
    (claimed,) = mill.claim(store, who)
    reconciler = Reconciler(store, QueueOfOne(), lease_seconds=60, loading_lease_seconds=60)  # type: ignore[arg-type]
    clock.seconds += 600  # nobody could renew; the worker does as soon as the store is back
    own_clock.seconds += 600
    reconciler.repair()
    reconciler.send_wakeups()
    assert mill.save(store, who, [BatchReport(claimed.lease)]).lost == frozenset()
    clock.seconds += 30
    own_clock.seconds += 31
    reconciler.repair()
    reconciler.send_wakeups()
    assert mill.save(store, who, [BatchReport(claimed.lease)]).lost == frozenset()


def test_a_lease_renewed_between_two_sightings_starts_again(
    store: Store, clock: mill.Clock, own_clock: mill.Clock
) -> None:
    mill.load(store, 4)
    who = mill.session(store)
    (claimed,) = mill.claim(store, who)
    reconciler = Reconciler(store, QueueOfOne(), lease_seconds=60, loading_lease_seconds=60)  # type: ignore[arg-type]
    for _ in range(4):
        clock.seconds += 61
        reconciler.repair()
        reconciler.send_wakeups()
        own_clock.seconds += 40
        assert mill.save(store, who, [BatchReport(claimed.lease)]).lost == frozenset()


def test_a_batch_held_by_a_clock_that_was_set_back_is_taken_back_within_a_lease(
    store: Store, clock: mill.Clock, own_clock: mill.Clock
) -> None:
    job_id = mill.load(store, 4)
    mill.claim(store, mill.session(store))
    reconciler = Reconciler(store, QueueOfOne(), lease_seconds=60, loading_lease_seconds=60)  # type: ignore[arg-type]
    clock.seconds -= 3_600
    for seconds in (29, 1):
        reconciler.repair()
        assert store.recovery.pending(most=9) == {}
        clock.seconds += seconds
        own_clock.seconds += seconds
    reconciler.repair()
    assert len(store.recovery.pending(most=9)) == 1
    assert store.jobs.job(job_id).counts.pending == 4


def test_a_submit_is_deleted_once_it_was_seen_expired_twice(
    store: Store, clock: mill.Clock, own_clock: mill.Clock
) -> None:
    mill.begin(store)
    alive = mill.begin(store)
    reconciler = Reconciler(store, QueueOfOne(), lease_seconds=600, loading_lease_seconds=60)  # type: ignore[arg-type]
    clock.seconds += 3_600  # somebody sets the clock, or the machine slept
    reconciler.repair()
    own_clock.seconds += 29
    reconciler.repair()
    assert mill.rows(store, "jobs") == 2
    store.creation.renew(alive, lease_seconds=60)
    own_clock.seconds += 1
    reconciler.repair()
    assert mill.rows(store, "jobs") == 1
    store.creation.open(alive, spec=mill.ECHO_SPEC, file_sha256="0", fingerprint="f", lease_seconds=60)


def test_dead_submits_are_deleted_and_cancelled_jobs_closed(
    store: Store, clock: mill.Clock, own_clock: mill.Clock
) -> None:
    mill.begin(store)
    job_id = mill.load(store, 4)
    who = mill.session(store)
    mill.claim(store, who)
    store.closing.cancel(job_id)
    store.recovery.take_back(who.worker_id, generation=1)
    clock.seconds += 61
    reconciler = Reconciler(store, QueueOfOne(), lease_seconds=60, loading_lease_seconds=60)  # type: ignore[arg-type]
    reconciler.repair()
    own_clock.seconds += 30
    reconciler.repair()
    reconciler.send_wakeups()
    assert mill.rows(store, "jobs") == 1
    assert store.jobs.job(job_id).state is JobState.CANCELLED


def test_a_broker_that_is_away_stops_nothing_else(store: Store) -> None:
    mill.load(store, 4)
    queue = QueueOfOne()
    queue.away = True
    reconciler = Reconciler(store, queue, lease_seconds=60, loading_lease_seconds=60)  # type: ignore[arg-type]
    reconciler.repair()
    reconciler.send_wakeups()
    queue.away = False
    Reconciler(store, queue, lease_seconds=60, loading_lease_seconds=60).send_wakeups()  # type: ignore[arg-type]
    assert list(queue.sent) == [queue_name(mill.ECHO_SPEC, store.id)]
