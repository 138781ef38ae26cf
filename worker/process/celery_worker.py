"""Celery's worker as batchmill runs it: one spawned child, and a pool that is kept whole whatever Redis does."""

from __future__ import annotations

import logging
import socket
import warnings
from collections.abc import Callable
from functools import partial
from time import monotonic, sleep
from typing import Any

from billiard.util import LOGGER_NAME
from celery.apps.worker import (
    Worker,
    install_worker_int_handler,
    install_worker_term_handler,
    install_worker_term_hard_handler,
)
from celery.concurrency.asynpool import AsynPool
from celery.concurrency.prefork import TaskPool
from celery.exceptions import SecurityWarning
from celery.worker.consumer import Consumer
from celery.worker.consumer.consumer import CONNECTION_RETRY
from celery.worker.request import Request
from celery.worker.state import maybe_shutdown
from kombu import Queue
from redis.exceptions import ResponseError

from batchmill.jobs.broker.client import make_app
from batchmill.jobs.configuration.settings import Settings
from batchmill.jobs.runtime.logs import FILE_ONLY, get_logger
from batchmill.worker.process.maintenance.semaphore_tracker import outlast_trackers

log = get_logger(__name__)
#: Celery gives a child this much longer than the watchdog to load its model.
_ALIVE_MARGIN_SECONDS = 60
#: Celery gives no task to a new child while it waits for the dead one's result, of which there is none.
_LOST_WAIT_SECONDS = 0.1
#: The pause after Redis refused something.
_REFUSED_SECONDS = 5.0
_TICK_SECONDS = 0.25
#: The number of last children whose ends are kept; the keeper asks within a heartbeat.
_REMEMBERED_CHILDREN = 8


def make_celery_worker(settings: Settings, *, queue: str, name: str) -> Any:
    """A Celery worker that takes the wake-ups of one queue; the caller starts it."""
    outlast_trackers()
    # Celery's advice against root is about pickle; JSON alone is accepted here.
    warnings.filterwarnings("ignore", category=SecurityWarning)
    logging.getLogger(Consumer.__module__).addFilter(_is_not_told_by_us)
    logging.getLogger(Request.__module__).addFilter(_is_no_lost_acknowledgement)
    logging.getLogger(LOGGER_NAME).addFilter(_is_no_end_of_a_child)
    app = make_app(settings.broker, ca_file=settings.broker_ca_file, insecure=settings.broker_insecure)
    app.conf.update(
        task_queues=[Queue(queue)],
        include=["batchmill.worker.process.app"],
        broker_channel_error_retry=True,  # a Redis that refuses (a full one, say) is one that is away
        worker_consumer=_Consumer,
        worker_lost_wait=_LOST_WAIT_SECONDS,
        worker_proc_alive_timeout=settings.load_stall_seconds + _ALIVE_MARGIN_SECONDS,
    )
    return app.subclass_with_self(_Worker)(
        hostname=f"{name}@{socket.gethostname()}",
        loglevel="WARNING",
        pool=_TaskPool,
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=True,
        quiet=True,
    )


def _is_not_told_by_us(record: logging.LogRecord) -> bool:
    """False for what Celery logs of a lost connection, which `_Consumer` tells in its own words."""
    return CONNECTION_RETRY not in (record.args or ())


def _is_no_lost_acknowledgement(record: logging.LogRecord) -> bool:
    """False for what is said of a wake-up that cannot be acknowledged, as the connection is lost: the store decides."""
    return not str(record.msg).startswith("Couldn't ack")


def _is_no_end_of_a_child(record: logging.LogRecord) -> bool:
    """False for what the pool logs of a child's end, which the keeper tells with its jobs."""
    return "exited with" not in str(record.msg)


class _Worker(Worker):  # type: ignore[misc]
    """A worker whose signals print nothing: what Celery says of a shutdown reads as a fault."""

    def install_platform_tweaks(self, worker: Any) -> None:
        super().install_platform_tweaks(worker)
        again = partial(install_worker_term_hard_handler, sig="SIGINT", verbose=False)
        install_worker_term_handler(worker, verbose=False)
        install_worker_int_handler(worker, callback=again, verbose=False)


class _Processes(AsynPool):  # type: ignore[misc]
    """The processes of the pool. Celery may keep the queues of a child that died while Redis was away for good."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        #: The end of each of the last children, by its pid, also of those that Celery has replaced.
        self.ends: dict[int, Any] = {}
        super().__init__(*args, **kwargs)

    def _create_worker_process(self, i: int) -> Any:
        process = super()._create_worker_process(i)
        self.ends[process.pid] = process._popen  # not the process itself, which holds its queues open
        for pid in list(self.ends)[:-_REMEMBERED_CHILDREN]:
            del self.ends[pid]
        return process

    def get_process_queues(self) -> Any:
        if all(owner is not None for owner in self._queues.values()):
            self._queues[self.create_process_queues()] = None
        return super().get_process_queues()


class _TaskPool(TaskPool):  # type: ignore[misc]
    """A pool whose first child may die before Redis was found; children that cannot begin are counted elsewhere."""

    Pool = _Processes

    def did_start_ok(self) -> bool:
        return True


class _Consumer(Consumer):  # type: ignore[misc]
    """A consumer that says itself when Redis is away, a line each time that it tries.

    It replaces a child that died while it looks for Redis, which Celery leaves to its event loop.
    """

    def ensure_connected(self, conn: Any) -> Any:
        ensure = conn.ensure_connection

        def with_pool(_errback: object, max_retries: object, *, callback: Callable[[], None]) -> Any:
            def look() -> None:
                callback()
                self.pool.maintain_pool()

            return ensure(_tell_of_absence, max_retries, callback=look)

        conn.ensure_connection = with_pool
        try:
            return super().ensure_connected(conn)
        finally:
            del conn.ensure_connection

    def on_connection_error_before_connected(self, exc: Exception) -> None:
        self._after_loss(exc)

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        super().on_connection_error_after_connected(exc)
        self._after_loss(exc)

    def _after_loss(self, exc: Exception) -> None:
        """Waits a while where Redis answers and refuses, since it would refuse the next connection at once."""
        if not (isinstance(exc, ResponseError) or isinstance(exc.__cause__, ResponseError)):
            get_logger(FILE_ONLY).info("the connection to Redis was lost, and is made again", error=str(exc))
            return
        log.warning(f"Redis refuses this worker; it is tried again in {_REFUSED_SECONDS:g} s", error=str(exc))
        end = monotonic() + _REFUSED_SECONDS
        while monotonic() < end:
            maybe_shutdown()
            self.pool.maintain_pool()
            sleep(_TICK_SECONDS)


def _tell_of_absence(error: Exception, seconds: float) -> None:
    log.warning(f"no connection to Redis; it is tried again in {seconds:g} s", error=str(error))
