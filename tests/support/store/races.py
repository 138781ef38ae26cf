"""Races: threads that begin at one barrier, round after round, and questions to the store about their end."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from time import monotonic, sleep
from typing import Any

from sqlalchemy import select

from batchmill.jobs.errors import JobStateError, KeyTaken
from batchmill.jobs.requests.states import JobState, RunOutcome
from batchmill.jobs.store.leases.lease import WorkerSession
from batchmill.jobs.store.store import Store
from batchmill.jobs.store.tables import batches, outputs, requests, runs
from tests.support.store import mill
from tests.support.store.oracle import violations

#: Some begin up to this much later than others, so that every order of their statements comes up.
_HESITATION_SECONDS = 0.002
Rounds = Iterator[random.Random]


def rounds_for(seconds: float) -> Rounds:
    chance, end = random.Random(20), monotonic() + seconds
    while monotonic() < end:
        yield chance


def at_once(chance: random.Random, *steps: Callable[[], Any]) -> list[Any]:
    """Runs every step in a thread of its own, all from one barrier. Returns their results, and raises their errors."""
    barrier = threading.Barrier(len(steps))
    done: list[Any] = [None] * len(steps)
    failed: list[BaseException] = []
    hesitations = [chance.uniform(0, _HESITATION_SECONDS) if chance.random() < 0.5 else 0.0 for _ in steps]

    def run(place: int, step: Callable[[], Any]) -> None:
        try:
            barrier.wait()
            if hesitations[place]:
                sleep(hesitations[place])
            done[place] = step()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(place, step)) for place, step in enumerate(steps)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return done


def state_of(store: Store, job_id: str) -> JobState:
    return store.jobs.job(job_id).state


def written_by(store: Store, run_id: int) -> set[int]:
    """The indexes of the outputs that one run wrote."""
    with store.database.read() as connection:
        return set(connection.scalars(select(outputs.c.index).where(outputs.c.run_id == run_id)))


def outcomes(store: Store, job_id: str) -> Counter[str | None]:
    """The outcomes of the runs of a job."""
    with store.database.read() as connection:
        return Counter(connection.scalars(select(runs.c.outcome).where(runs.c.job_id == job_id)))


def crash_counts(store: Store, job_id: str) -> list[int]:
    """The crashes of every request of a job, in order: deaths of a process that had it in flight."""
    of_batch = select(batches.c.crashes).join_from(requests, batches, requests.c.batch_id == batches.c.id)
    with store.database.read() as connection:
        found = of_batch.where(requests.c.job_id == job_id).order_by(requests.c.index)
        return list(connection.scalars(found))


def crashed_runs(store: Store) -> set[int]:
    with store.database.read() as connection:
        return set(connection.scalars(select(runs.c.id).where(runs.c.outcome == RunOutcome.CRASHED)))


def retried(store: Store, job_id: str) -> int:
    """Retries a job and returns the number of reopened requests, 0 for a job that is open again."""
    try:
        return store.retries.retry(job_id).moved
    except JobStateError:
        return 0


def open_under(store: Store, key: str) -> tuple[str, bool]:
    """Loads a job and opens it under a key. Returns the job that has the key now, and True where it is this one."""
    job_id = mill.begin(store)
    store.creation.add(job_id, prompts=mill.prompts(1), batch_size=4, lease_seconds=mill.LEASE_SECONDS)
    try:
        store.creation.open(
            job_id,
            spec=mill.ECHO_SPEC,
            file_sha256="0" * 64,
            fingerprint="fingerprint",
            lease_seconds=mill.LEASE_SECONDS,
            idempotency_key=key,
        )
    except KeyTaken as taken:
        store.creation.discard(job_id)
        return taken.job_id, False
    return job_id, True


def finish_off(store: Store, who: WorkerSession, job_id: str) -> None:
    """Works off what is left of a job, which then has to be closed, without a fault."""
    mill.work_off(store, who)
    assert state_of(store, job_id) is JobState.COMPLETED
    assert violations(store) == []
