"""The process that holds the model: how it begins, and how it ends when it cannot go on."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from jobs.errors import AlreadyRunning, ModelError, StoreError, StoreUnavailable
from jobs.states import WorkerState
from jobs.store import Store
from tests import mill
from worker import child, device_lock
from worker.child import Child, ChildOrder
from worker.device_lock import DeviceLock
from worker.devices import DeviceInfo
from worker.placement import Placement


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
    order = ChildOrder(7, "echo?quantization=none", Placement(("cpu",)).to_json(), None, True)
    monkeypatch.setenv(child.ORDER_VARIABLE, order.to_environment())
    assert ChildOrder.from_environment() == order


class TestBeginning:
    """What a child does that cannot hold its device or its model: it says why, ends its parent and waits."""

    @pytest.fixture
    def worker_id(self, sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Store, int]]:
        store = Store(sqlite_url)
        worker_id = mill.seat(store, ready=False).worker_id
        order = ChildOrder(worker_id, mill.ECHO_SPEC.canonical, Placement(("cuda:0",)).to_json(), None, False)
        monkeypatch.setenv("BATCHMILL_DATABASE_URL", sqlite_url)
        monkeypatch.setenv(child.ORDER_VARIABLE, order.to_environment())
        monkeypatch.setattr(child, "configure_logs", lambda settings: None)
        monkeypatch.setattr(child.os, "kill", lambda pid, number: None)

        def pause() -> None:
            raise Ended(0)

        monkeypatch.setattr(child.signal, "pause", pause)
        monkeypatch.setattr(child.signal, "signal", lambda number, handler: None)
        yield store, worker_id
        store.close()

    def gave_up(self, store: Store) -> tuple[WorkerState, str | None]:
        with pytest.raises(Ended):
            child.begin()
        (row,) = store.workers.rows(only_alive=False)
        return row.state, row.error

    def test_a_device_that_another_process_holds_is_refused(
        self, worker_id: tuple[Store, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(child, "describe_devices", lambda devices: (DeviceInfo("fake", "GPU-7", 1, "cpu"),))
        monkeypatch.setattr(device_lock, "_MACHINES_FOLDER", tmp_path)
        monkeypatch.setattr(device_lock, "_PATIENCE_SECONDS", 0.1)
        other = DeviceLock("GPU-7")
        other.take()
        state, error = self.gave_up(worker_id[0])
        assert state is WorkerState.FAILED
        assert f"GPU-7 (pid {os.getpid()})" in str(error)

    def test_a_device_is_held_as_long_as_the_child_lives(
        self, worker_id: tuple[Store, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(child, "describe_devices", lambda devices: (DeviceInfo("fake", "GPU-7", 1, "cpu"),))
        monkeypatch.setattr(device_lock, "_MACHINES_FOLDER", tmp_path)
        monkeypatch.setattr(device_lock, "_PATIENCE_SECONDS", 0.1)
        begun = child.begin()
        gc.collect()
        with pytest.raises(AlreadyRunning):
            DeviceLock("GPU-7").take()
        del begun
        gc.collect()
        DeviceLock("GPU-7").take()

    def test_a_device_that_does_not_work_makes_the_worker_sick(
        self, worker_id: tuple[Store, int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def describe(devices: Sequence[str]) -> tuple[DeviceInfo, ...]:
            raise ModelError("cannot load it") from RuntimeError("CUDA error: uncorrectable ECC error encountered")

        monkeypatch.setattr(child, "describe_devices", describe)
        state, error = self.gave_up(worker_id[0])
        assert (state, error) == (WorkerState.SICK, "cannot load it")

    def test_a_device_that_cannot_even_be_described_makes_the_worker_sick(
        self, worker_id: tuple[Store, int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def describe(devices: Sequence[str]) -> tuple[DeviceInfo, ...]:
            raise RuntimeError("CUDA error: device-side assert triggered")

        monkeypatch.setattr(child, "describe_devices", describe)
        state, error = self.gave_up(worker_id[0])
        assert state is WorkerState.SICK
        assert "device-side assert" in str(error)

    def test_too_little_memory_is_no_sickness(
        self, worker_id: tuple[Store, int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def describe(devices: Sequence[str]) -> tuple[DeviceInfo, ...]:
            raise ModelError("too large") from RuntimeError("CUDA error: out of memory")

        monkeypatch.setattr(child, "describe_devices", describe)
        assert self.gave_up(worker_id[0])[0] is WorkerState.FAILED
