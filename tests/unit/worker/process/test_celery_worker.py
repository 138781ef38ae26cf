"""Celery's worker as batchmill runs it."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator

import pytest
from billiard.util import LOGGER_NAME
from celery.concurrency.asynpool import AsynPool
from celery.worker import state
from celery.worker.consumer import Consumer
from celery.worker.consumer.consumer import CONNECTION_RETRY
from celery.worker.request import Request
from kombu.transport import virtual

from batchmill.jobs.configuration.settings import Settings
from batchmill.worker.process.celery_worker import _Processes, _TaskPool, make_celery_worker


def test_a_child_gets_queues_though_those_of_the_last_one_were_never_given_back() -> None:
    """Celery raises StopIteration there, which ends the worker."""
    pool = object.__new__(_Processes)
    pool.synack = False
    pool._queues = {pool.create_process_queues(): object()}
    queues = pool.get_process_queues()
    assert pool._queues[queues] is None
    assert len(pool._queues) == 2
    assert issubclass(_TaskPool.Pool, AsynPool)


@pytest.fixture
def signals_come_back() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}}
    yield
    for number, handler in before.items():
        if handler is not None:
            signal.signal(number, handler)
    state.should_stop = state.should_terminate = None


@pytest.mark.usefixtures("signals_come_back")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_worker_that_is_told_to_end_prints_nothing(number: signal.Signals, capfd: pytest.CaptureFixture[str]) -> None:
    worker = make_celery_worker(Settings(broker_url="redis://mill.invalid/0"), queue="q", name="w")
    worker.install_platform_tweaks(worker)
    signal.raise_signal(number)
    assert state.should_stop is not None
    assert capfd.readouterr() == ("", "")


def test_of_a_lost_connection_celery_says_nothing_beside_us(caplog: pytest.LogCaptureFixture) -> None:
    make_celery_worker(Settings(broker_url="redis://mill.invalid/0"), queue="q", name="w")
    celery = logging.getLogger(Consumer.__module__)
    celery.warning("%s (%r)", CONNECTION_RETRY, OSError("gone"))
    celery.error("another error of %s", "Celery")
    assert [each.getMessage() for each in caplog.records] == ["another error of Celery"]


def test_of_a_wake_up_that_cannot_be_acknowledged_celery_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    make_celery_worker(Settings(broker_url="redis://mill.invalid/0"), queue="q", name="w")
    logger = logging.getLogger(Request.__module__)

    class Lost(virtual.Message):  # type: ignore[misc]
        def ack(self, multiple: bool = False) -> None:
            raise ConnectionError

    Lost({"properties": {"delivery_tag": "a"}}).ack_log_error(logger, (ConnectionError,))
    logger.critical("another error of %s", "Celery")
    assert [each.getMessage() for each in caplog.records] == ["another error of Celery"]


def test_of_the_end_of_a_child_the_pool_says_nothing_beside_the_keeper() -> None:
    make_celery_worker(Settings(broker_url="redis://mill.invalid/0"), queue="q", name="w")
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    pool = logging.getLogger(LOGGER_NAME)
    pool.addHandler(handler)
    pool.error("Process %r pid:%r exited with %r", "a child", 7, "signal 9 (SIGKILL)")
    pool.error("another error of %s", "the pool")
    pool.removeHandler(handler)
    assert [each.getMessage() for each in records] == ["another error of the pool"]
