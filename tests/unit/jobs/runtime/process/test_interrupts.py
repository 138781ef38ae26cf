"""Signals that come in the middle of a transaction end a command after it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from sqlalchemy import text

from batchmill.jobs.runtime.process.interrupts import interrupts_later
from batchmill.jobs.store.store import Store
from batchmill.producer.cli.local.mill import ended_by_signal

NUMBERS = [signal.SIGINT, signal.SIGTERM]


@pytest.fixture(autouse=True)
def handled() -> Iterator[None]:
    """The handlers of `run` and `up`."""
    with ended_by_signal():
        yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def interrupt(number: signal.Signals = signal.SIGINT, *, times: int = 1) -> None:
    for _ in range(times):
        os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", NUMBERS)
def test_outside_of_a_transaction_it_comes_at_once(number: signal.Signals) -> None:
    with pytest.raises(KeyboardInterrupt):
        interrupt(number)


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("writes", [False, True])
def test_a_transaction_comes_to_its_end_first(store: Store, writes: bool, number: signal.Signals) -> None:
    begin = store.database.write if writes else store.database.read
    answers = []

    def work() -> None:
        with begin() as connection:
            interrupt(number)
            answers.append(connection.scalar(text("SELECT 1")))

    with pytest.raises(KeyboardInterrupt) as caught:
        work()
    assert answers == [1]
    with store.database.write():
        assert caught.value.__traceback__ is not None, "also while the interrupt is handled, the store is free"


def test_an_inner_context_leaves_it_to_the_outer_one() -> None:
    reached = []

    def work() -> None:
        with interrupts_later():
            with interrupts_later():
                interrupt()
            reached.append(1)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert reached == [1]


def test_the_second_one_does_not_wait() -> None:
    reached = []

    def work() -> None:
        with interrupts_later():
            interrupt(times=2)
            reached.append(1)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert reached == []


def test_an_error_of_the_transaction_does_not_hide_it(store: Store) -> None:
    def work() -> None:
        with store.database.read():
            interrupt()
            raise ValueError

    with pytest.raises(KeyboardInterrupt):
        work()
