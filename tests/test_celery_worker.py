"""Celery's worker as batchmill runs it."""

from __future__ import annotations

from celery.concurrency.asynpool import AsynPool

from worker.celery_worker import _Pool, _Processes


def test_a_child_gets_queues_though_those_of_the_last_one_were_never_given_back() -> None:
    """Celery raises StopIteration there, which ends the worker."""
    pool = object.__new__(_Processes)
    pool.synack = False
    pool._queues = {pool.create_process_queues(): object()}
    queues = pool.get_process_queues()
    assert pool._queues[queues] is None
    assert len(pool._queues) == 2
    assert issubclass(_Pool.Pool, AsynPool)
