"""The keeper's care of its child, without any process: its log of a child that died."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from structlog.testing import capture_logs

from batchmill.jobs.broker.client import Broker
from batchmill.jobs.configuration.settings import load_settings
from batchmill.jobs.store.leases.lease import WorkerSession
from batchmill.jobs.store.store import Store
from batchmill.worker.process.maintenance.keeper import Keeper
from batchmill.worker.process.maintenance.namesakes import Namesakes
from batchmill.worker.process.maintenance.pool import Pool
from batchmill.worker.process.worker_options import WorkerOptions
from tests.support.store import mill


class Ended:
    """Stands in for a process that Celery started, and has replaced since."""

    def __init__(self, code: int) -> None:
        self._code = code

    def poll(self) -> int:
        return self._code


class CeleryWorker:
    """Stands in for a Celery worker, its pool and the pool's processes."""

    def __init__(self, ends: dict[int, Ended]) -> None:
        self.pool, self._pool, self.ends = self, self, ends

    def __iter__(self) -> Iterator[object]:
        return iter(())


def keeper_of(store: Store, url: str, who: WorkerSession, *, ended: Ended) -> Keeper:
    """The keeper of a worker whose first child, pid 2, has ended like this."""
    settings = load_settings(database_url=url, broker_url="redis://127.0.0.1:1")
    broker = Broker.of(settings)
    return Keeper(
        store,
        broker,
        who.worker_id,
        options=WorkerOptions(who.spec),
        settings=settings,
        pool=Pool(CeleryWorker({2: ended})),
        asked_to_end=threading.Event(),
        namesakes=Namesakes(store, broker, who.worker_id, name="w", process=None),
    )


def test_the_end_of_a_child_is_told_also_where_the_next_one_reported_first(sqlite_url: str) -> None:
    store = Store(sqlite_url)
    who = mill.session(store)
    keeper = keeper_of(store, sqlite_url, who, ended=Ended(-9))
    keeper._beat()
    job_id = mill.load(store, 4)
    mill.claim(store, who)
    store.registration.new_generation(who.worker_id, child_pid=3)
    with capture_logs() as said:
        keeper._beat()
        keeper._beat()
    told = {"log_level": "warning", "worker": who.worker_id}
    assert said == [
        told | {"event": "the child died", "pid": 2, "state": "ready", "ended_by": "SIGKILL", "jobs": [job_id]},
        told | {"event": "took back leases", "job": job_id, "batches": 1, "outcome": "crashed"},
    ]
    store.close()


@pytest.mark.parametrize(("code", "told"), [(0, []), (1, ["the child died"])])
def test_a_child_that_ends_as_it_is_told_has_not_died(sqlite_url: str, code: int, told: list[str]) -> None:
    """SIGTERM at the moment in which the child became ready: it ends, and Celery starts another one all the same."""
    store = Store(sqlite_url)
    who = mill.session(store)
    keeper = keeper_of(store, sqlite_url, who, ended=Ended(code))
    keeper._beat()
    keeper.on_shutdown()
    store.registration.new_generation(who.worker_id, child_pid=3)
    with capture_logs() as said:
        keeper._beat()
    assert [each["event"] for each in said] == told
    store.close()
