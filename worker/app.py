"""The Celery entry: one task, as thin as paper, and the one engine that a worker's child process holds."""

from __future__ import annotations

from celery import shared_task
from celery.signals import setup_logging, worker_process_init

from jobs.gate import WAKE_TASK
from worker.child import Child, begin

_child: Child | None = None


@worker_process_init.connect
def _begin(**_: object) -> None:
    """A child was spawned: it loads its model before it is given a task."""
    global _child
    _child = begin()


@setup_logging.connect
def _keep_logging(**_: object) -> None:
    """Connected so that Celery leaves the logs as jobs.logs configured them."""


@shared_task(name=WAKE_TASK, ignore_result=True)
def wake(batch_id: int) -> None:
    """There may be work: claims the best pending batch, not necessarily this one, and works while there is any."""
    assert _child is not None, "Celery gives a task to a child only after worker_process_init"
    _child.work()
