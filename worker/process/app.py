"""The Celery entry: one task, as thin as paper, and the one engine that a worker's child process holds."""

from __future__ import annotations

from celery import shared_task
from celery.signals import setup_logging, worker_process_init, worker_process_shutdown

from batchmill.jobs.broker.message_filter import WAKE_TASK
from batchmill.worker.process.child import Child
from batchmill.worker.process.startup import begin

_child: Child | None = None


@worker_process_init.connect
def _begin(**_: object) -> None:
    """A child was spawned: it loads its model before it is given a task."""
    global _child
    _child = begin()
    _child.start()


@worker_process_shutdown.connect
def _finish(**_: object) -> None:
    """Celery, which waits for its tasks alone, ends this process: what it found by itself is handed back as well."""
    if _child is not None:
        _child.finish()


@setup_logging.connect
def _keep_logging(**_: object) -> None:
    """Connected so that Celery leaves the logs as jobs.runtime.logs configured them."""


@shared_task(name=WAKE_TASK, ignore_result=True)
def wake(batch_id: int) -> None:
    """There may be work: claims the best pending batch, not necessarily this one, and works while there is any."""
    assert _child is not None, "Celery gives a task to a child only after worker_process_init"
    _child.wake()
