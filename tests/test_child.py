"""The process that holds the model: how it begins, and how it ends when it cannot go on."""

from __future__ import annotations

import pytest

from jobs.errors import StoreError, StoreUnavailable
from worker import child
from worker.child import Child, ChildOrder


class Ended(BaseException):
    """Stands in for the end of this process."""


@pytest.fixture(autouse=True)
def no_exit(monkeypatch: pytest.MonkeyPatch) -> None:
    def end(code: int) -> None:
        raise Ended(code)

    monkeypatch.setattr(child.os, "_exit", end)
    monkeypatch.setattr(child, "_STORE_PAUSE_SECONDS", 0.0)


class BrokenRunner:
    def run(self) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")


def test_an_engine_that_fails_ends_the_process_so_that_its_leases_are_not_renewed() -> None:
    with pytest.raises(Ended) as ended:
        Child(BrokenRunner()).work()  # type: ignore[arg-type]
    assert ended.value.args == (1,)


def test_a_store_that_is_away_is_waited_for() -> None:
    answers = iter([StoreUnavailable("away"), StoreUnavailable("away"), 7])

    def call() -> int:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert child._answered(call) == 7


def test_a_store_that_refuses_is_not_waited_for() -> None:
    def call() -> None:
        raise StoreError("no such column")

    with pytest.raises(StoreError, match="no such column"):
        child._answered(call)


def test_an_order_survives_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    order = ChildOrder(7, "echo?quantization=none", "cpu", None, True)
    monkeypatch.setenv(child.ORDER_VARIABLE, order.to_environment())
    assert ChildOrder.from_environment() == order
