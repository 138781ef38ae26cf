"""The keeper's care of its child, without any process: its log of a child that died."""

from __future__ import annotations

import threading

from structlog.testing import capture_logs

from batchmill.jobs.broker.client import Broker
from batchmill.jobs.configuration.settings import load_settings
from batchmill.jobs.store.store import Store
from batchmill.worker.process.maintenance.keeper import Keeper
from batchmill.worker.process.maintenance.namesakes import Namesakes
from batchmill.worker.process.maintenance.pool import Pool
from batchmill.worker.process.worker_options import WorkerOptions
from tests.support.store import mill


class Ended:
    """Stands in for a process that Celery started: killed, and replaced since."""

    def poll(self) -> int:
        return -9


class CeleryWorker:
    """Stands in for a Celery worker, its pool and the pool's processes."""

    def __init__(self, ends: dict[int, Ended]) -> None:
        self.pool, self._pool, self.ends = self, self, ends


def test_the_end_of_a_child_is_told_also_where_the_next_one_reported_first(sqlite_url: str) -> None:
    store, settings = Store(sqlite_url), load_settings(database_url=sqlite_url, broker_url="redis://127.0.0.1:1")
    broker, who = Broker.of(settings), mill.session(store)
    keeper = Keeper(
        store,
        broker,
        who.worker_id,
        options=WorkerOptions(who.spec),
        settings=settings,
        pool=Pool(CeleryWorker({2: Ended()})),
        asked_to_end=threading.Event(),
        namesakes=Namesakes(store, broker, who.worker_id, name="w", process=None),
    )
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
