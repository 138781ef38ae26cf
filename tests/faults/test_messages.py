"""Wake-ups doubled, late or of nothing, and several reconcilers at once: the store decides, so none of it matters."""

from __future__ import annotations

import threading
from contextlib import ExitStack

import psutil
import pytest
from kombu import Queue
from sqlalchemy import text

from batchmill.jobs.broker.client import Broker, make_app
from batchmill.jobs.broker.message_filter import WAKE_TASK
from batchmill.jobs.store.store import Store
from batchmill.worker.process.maintenance.reconciler import Reconciler
from tests.faults.conftest import SLOW, FaultMill, ProxiedMill, sqlite_first
from tests.integration.conftest import until


def send(mill: FaultMill, batch_ids: list[int], *, copies: int) -> None:
    app = make_app(mill.settings.broker)
    task = app.signature(WAKE_TASK)
    for batch_id in batch_ids:
        for _ in range(copies):
            task.apply_async((batch_id,), queue=Queue(mill.echo_queue))
    app.close()


def done_runs(mill: FaultMill) -> dict[int, int]:
    """Counts the runs that answered each batch to its end."""
    with mill.store.database.read() as connection:
        rows = connection.execute(text("SELECT batch_id, count(*) FROM runs WHERE outcome = 'done' GROUP BY batch_id"))
        return {row[0]: row[1] for row in rows}


def test_ten_copies_of_every_message_to_two_workers(mill: FaultMill, database_url: str) -> None:
    workers = [mill.start("worker", "-m", "echo", "--name", name, **SLOW) for name in ("a", "b")]
    until(lambda: len(mill.ready()) == 2, "two workers")
    job_id = mill.submit(120, "--batch-size", "8")
    batch_ids = list(range(1, 16))
    send(mill, [*batch_ids, 10**9], copies=10)
    mill.wait(job_id)
    send(mill, batch_ids, copies=2)
    mill.check_ended(job_id, 120)
    until(lambda: mill.queue_length(mill.echo_queue) == 0, "the queue is drained")
    assert done_runs(mill) == dict.fromkeys(batch_ids, 1)
    assert mill.repeated() == 0
    assert all(worker.poll() is None for worker in workers)
    assert {row.leases for row in mill.store.workers.rows()} == {0}


@sqlite_first
def test_three_reconcilers_at_once(proxied_mill: ProxiedMill, database_url: str) -> None:
    """They take back the same leases, close the same jobs and send the same wake-ups, while a worker is killed."""
    mill = proxied_mill
    over = threading.Event()
    most_sent = []
    worker = mill.ready_worker("--name", "killed", lease_seconds=1.0, **SLOW)
    job_id = mill.submit(160, "--batch-size", "8")
    until(lambda: mill.succeeded(job_id) > 20, "some answers")
    with ExitStack() as stack:
        stack.callback(over.set)
        for _ in range(3):
            thread = threading.Thread(target=reconcile, args=(mill, over, most_sent))
            thread.start()
            stack.callback(thread.join)
            stack.callback(over.set)
        kill_tree(worker.pid)
        until(lambda: mill.repeated() > 0, "the leases of the dead are taken back")
        mill.ready_worker(**SLOW)
        mill.wait(job_id)
    mill.check_ended(job_id, 160)
    assert max(most_sent) <= 3 * 20
    until(lambda: mill.queue_length(mill.echo_queue) == 0, "the queue is drained")


def reconcile(mill: ProxiedMill, over: threading.Event, lengths: list[int]) -> None:
    """A reconciler of its own, as another worker's parent has one, in a hurry."""
    store, broker = Store(mill.settings.database), Broker(mill.settings.broker)
    reconciler = Reconciler.of(mill.settings, store, broker)
    while not over.wait(0.1):
        reconciler.repair()
        reconciler.send_wakeups()
        lengths.append(mill.queue_length(mill.echo_queue))
    store.close()
    broker.close()


def kill_tree(pid: int) -> None:
    """Ends a worker and its child at once, as a machine that is switched off does."""
    parent = psutil.Process(pid)
    for each in (*parent.children(recursive=True), parent):
        each.kill()


@pytest.mark.slow
def test_clients_killed_by_redis_again_and_again(proxied_mill: ProxiedMill) -> None:
    mill = proxied_mill
    worker = mill.ready_worker(**SLOW)
    job_id = mill.submit(250)
    with mill.server.client() as client:
        while mill.succeeded(job_id) < 250:
            for kind in ("normal", "pubsub"):
                client.client_kill_filter(_type=kind, skipme=True)
            until(lambda: True, "", seconds=1)
    mill.wait(job_id)
    mill.check_ended(job_id, 250)
    assert worker.poll() is None
    assert mill.repeated() == 0
