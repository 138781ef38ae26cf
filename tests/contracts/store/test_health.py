"""A broken device is told from a bad prompt, and what a device holds is remembered."""

from __future__ import annotations

from dataclasses import replace

import pytest
from sqlalchemy import select

from batchmill.jobs.requests.states import BatchState, WorkerState
from batchmill.jobs.runtime.process.process import Process
from batchmill.jobs.store.leases.lease import WorkerSession
from batchmill.jobs.store.store import Store
from batchmill.jobs.store.tables import batches
from tests.support.store import mill


@pytest.fixture
def good(store: Store) -> WorkerSession:
    return mill.session(store, name="good")


@pytest.fixture
def broken(store: Store) -> WorkerSession:
    return mill.session(store, name="broken")


def crash(store: Store, who: WorkerSession, *, answers: int = 0) -> WorkerSession:
    """Claims a batch, answers some of it and dies; the next child's session."""
    (claimed,) = mill.claim(store, who)
    if answers:
        mill.save(store, who, [mill.answered(claimed, count=answers)])
    store.recovery.take_back(who.worker_id, generation=who.generation)
    generation = store.registration.new_generation(who.worker_id, child_pid=3)
    return WorkerSession(who.worker_id, generation, who.spec, who.device, who.lease_seconds, who.identity)


def answer(store: Store, who: WorkerSession) -> None:
    (claimed,) = mill.claim(store, who)
    mill.save(store, who, [mill.answered(claimed)])


def test_three_different_sets_while_others_succeed_are_the_devices_fault(
    store: Store, good: WorkerSession, broken: WorkerSession
) -> None:
    mill.load(store, 40, batch_size=4)
    for crashes in range(3):
        assert not store.health.is_sick(broken.worker_id), crashes
        broken = crash(store, broken)
        answer(store, good)
    assert store.health.is_sick(broken.worker_id)
    store.health.enter_sick(broken.worker_id, reason="it broke")
    with store.database.read() as connection:
        pending = select(batches.c.crashes).where(batches.c.state == BatchState.PENDING.value)
        assert set(connection.scalars(pending).all()) == {0}  # nobody is suspect any more
    (row,) = [each for each in store.workers.rows(only_alive=False) if each.name == "broken"]
    assert (row.state, row.error, row.alive) == (WorkerState.SICK, "it broke", False)


def test_alone_nobody_is_sick(store: Store, broken: WorkerSession) -> None:
    mill.load(store, 40, batch_size=4)
    for _ in range(4):
        broken = crash(store, broken)
    assert not store.health.is_sick(broken.worker_id)


def test_a_worker_that_answers_between_its_crashes_is_not_sick(
    store: Store, good: WorkerSession, broken: WorkerSession
) -> None:
    mill.load(store, 40, batch_size=4)
    for _ in range(3):
        broken = crash(store, broken, answers=1)
        answer(store, good)
    assert not store.health.is_sick(broken.worker_id)


def test_the_same_requests_again_are_not_a_different_set(
    store: Store, good: WorkerSession, broken: WorkerSession
) -> None:
    mill.load(store, 4, batch_size=4)
    for _ in range(3):
        broken = crash(store, broken)
    mill.load(store, 4, batch_size=4)
    assert not store.health.is_sick(broken.worker_id)


def test_where_others_crash_too_the_prompts_are_to_blame(
    store: Store, good: WorkerSession, broken: WorkerSession
) -> None:
    mill.load(store, 80, batch_size=4)
    for _ in range(3):
        broken = crash(store, broken)
        answer(store, good)
    crash(store, good)
    assert not store.health.is_sick(broken.worker_id)


def test_a_sick_worker_stays_sick(store: Store, broken: WorkerSession) -> None:
    store.health.enter_sick(broken.worker_id, reason="it broke")
    store.registration.enter(broken.worker_id, WorkerState.DRAINING)
    assert store.workers.gave_up(host="host", pid=1) is WorkerState.SICK


def test_an_earlier_worker_of_the_same_pid_says_nothing_of_a_later_one(store: Store) -> None:
    """The processes of a container have the pids that those before its restart had."""
    before = Process.own()
    assert before is not None
    now = replace(before, start_ticks=before.start_ticks + 1)
    failed = mill.session(store, process=before)
    store.registration.enter(failed.worker_id, WorkerState.FAILED, error="no such model")
    assert store.workers.gave_up(host="host", pid=1, process=before) is WorkerState.FAILED
    assert store.workers.gave_up(host="host", pid=1, process=now) is None


def test_a_child_that_replaces_the_one_that_gave_up_changes_nothing(store: Store, broken: WorkerSession) -> None:
    """A pool replaces each process that ends, also the one after which its worker stops."""
    store.registration.enter(broken.worker_id, WorkerState.FAILED, error="no such model")
    generation = store.registration.new_generation(broken.worker_id, child_pid=3)
    assert generation > broken.generation
    assert store.workers.gave_up(host="host", pid=1) is WorkerState.FAILED


def test_what_fits_is_remembered_by_spec_and_device(store: Store) -> None:
    assert store.health.known_capacity(mill.ECHO_SPEC, "GPU-1") is None
    for fits in (64, 32):
        store.health.remember_capacity(mill.ECHO_SPEC, "GPU-1", fits)
    assert store.health.known_capacity(mill.ECHO_SPEC, "GPU-1") == 32
    assert store.health.known_capacity(mill.ECHO_SPEC, "GPU-2") is None


def test_a_child_of_a_sick_worker_claims_nothing(store: Store, broken: WorkerSession) -> None:
    mill.load(store, 4)
    store.health.enter_sick(broken.worker_id, reason="it broke")
    turned = store.leases.sync(broken, [], wanted_requests=4, in_flight_room=4)
    assert turned.drain
    assert turned.claimed == ()
