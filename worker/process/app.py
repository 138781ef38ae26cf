"""The Celery entry: one thin task, and the child that this process is."""

from __future__ import annotations

from celery import shared_task
from celery.signals import setup_logging, worker_process_init, worker_process_shutdown

from batchmill.jobs.broker.message_filter import WAKE_TASK
from batchmill.worker.process.child import Child
from batchmill.worker.process.startup import begin

_child: Child | None = None


@worker_process_init.connect
def _begin(**_: object) -> None:
    """Loads the model of a child that was just spawned, before it is given a task."""
    global _child
    _child = begin()
    _child.start()


@worker_process_shutdown.connect
def _finish(**_: object) -> None:
    """Hands everything back before Celery ends this process: Celery waits for its own tasks alone."""
    if _child is not None:
        _child.finish()


@setup_logging.connect
def _keep_logging(**_: object) -> None:
    """Does nothing; it is connected so that Celery leaves the logs as jobs.runtime.logs configured them."""


@shared_task(name=WAKE_TASK, ignore_result=True)
def wake(batch_id: int) -> None:
    """Claims the best pending batch, not necessarily this one, and works while there is any."""
    assert _child is not None, "Celery gives a task to a child only after worker_process_init"
    _child.wake()
