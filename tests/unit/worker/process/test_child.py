"""The process that holds the model: its start, and its end when it cannot go on."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from batchmill.jobs.errors import AlreadyRunning, ModelError, StoreError, StoreUnavailable
from batchmill.jobs.models.adapters import Adapter
from batchmill.jobs.models.digests import Digests
from batchmill.jobs.models.engine_facts import EngineFacts, EngineLimits
from batchmill.jobs.models.identity import Content, of_model
from batchmill.jobs.requests.states import WorkerState
from batchmill.jobs.store.store import Store
from batchmill.jobs.store.views.jobs import Job
from batchmill.worker.devices import lock as device_lock
from batchmill.worker.devices.lock import DeviceLock
from batchmill.worker.devices.placement import Placement
from batchmill.worker.devices.selection import DeviceInfo
from batchmill.worker.loop import outage
from batchmill.worker.models.sources import Sources
from batchmill.worker.process import child, startup
from batchmill.worker.process.child import Child
from batchmill.worker.process.order import ORDER_VARIABLE, ChildOrder
from batchmill.worker.process.pulse import Pulse
from tests.support.paths import ROOT
from tests.support.store import mill


class Ended(BaseException):
    """Stands in for the end of this process."""


@pytest.fixture(autouse=True)
def no_exit(monkeypatch: pytest.MonkeyPatch) -> None:
    def end(code: int) -> None:
        raise Ended(code)

    monkeypatch.setattr(child.os, "_exit", end)
    monkeypatch.setattr(outage, "_PAUSE_SECONDS", 0.0)


NO_SOURCES = Sources((), give_up=pytest.fail)


class BrokenRunner:
    def run(self) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")


def test_an_engine_that_fails_ends_the_process_so_that_its_leases_are_not_renewed() -> None:
    with pytest.raises(Ended) as ended:
        Child(BrokenRunner(), NO_SOURCES).work()  # type: ignore[arg-type]
    assert ended.value.args == (1,)


class IdleRunner:
    def __init__(self) -> None:
        self.runs = 0

    def run(self) -> None:
        self.runs += 1


class TestFilesThatWereWritten:
    @pytest.fixture
    def content(self, tmp_path: Path) -> Content:
        (tmp_path / "model.safetensors").write_text("weights")
        return of_model(tmp_path, Digests())

    def test_another_model_is_loaded_by_another_process(self, content: Content) -> None:
        runner = IdleRunner()
        (weights,) = content.stamps
        weights.write_text("another")
        with pytest.raises(Ended) as ended:
            Child(runner, Sources([content], give_up=pytest.fail)).work()  # type: ignore[arg-type]
        assert ended.value.args == (0,)
        assert runner.runs == 1  # the jobs that were begun are worked off first

    def test_the_same_model_begins_what_was_left(self, content: Content) -> None:
        runner = IdleRunner()
        (weights,) = content.stamps
        os.utime(weights, (1, 1))
        Child(runner, Sources([content], give_up=pytest.fail)).work()  # type: ignore[arg-type]
        assert runner.runs == 2


def test_a_store_that_is_away_is_waited_for() -> None:
    answers = iter([StoreUnavailable("away"), StoreUnavailable("away"), 7])

    def call() -> int:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert outage.outlast(call) == 7


def test_a_store_that_refuses_is_not_waited_for() -> None:
    def call() -> None:
        raise StoreError("no such column")

    with pytest.raises(StoreError, match="no such column"):
        outage.outlast(call)


class TestBeginning:
    """A child that cannot open its device or its model says why, ends its parent and waits."""

    @pytest.fixture
    def worker_id(self, sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Store, int]]:
        store = Store(sqlite_url)
        worker_id = mill.session(store, ready=False).worker_id
        placement = Placement(("cuda:0",)).to_json()
        order = ChildOrder(
            worker_id, mill.ECHO_SPEC.canonical, placement, None, False, None, Pulse.create().path, "", 7
        )
        monkeypatch.setenv("BATCHMILL_DATABASE_URL", sqlite_url)
        monkeypatch.setenv(ORDER_VARIABLE, order.to_environment())
        monkeypatch.setattr(startup, "configure_logs", lambda **_: None)
        monkeypatch.setattr(startup, "die_with_parent", lambda number, parent_pid: None)
        monkeypatch.setattr(startup.os, "kill", lambda pid, number: None)

        def pause() -> None:
            raise Ended(0)

        monkeypatch.setattr(startup.signal, "pause", pause)
        monkeypatch.setattr(startup.signal, "signal", lambda number, handler: None)
        yield store, worker_id
        store.close()

    def gave_up(self, store: Store) -> tuple[WorkerState, str | None]:
        with pytest.raises(Ended):
            startup.begin()
        (row,) = store.workers.rows(only_alive=False)
        return row.state, row.error

    def test_whose_parent_is_gone_by_then_ends_at_once(self, worker_id: tuple[Store, int]) -> None:
        """It would hang without anybody to see to it, and send its signals to whoever has become its parent."""
        before = worker_id[0].registration.heartbeat(worker_id[1], beat=5.0)
        begin = f"{sys.executable} -c 'from batchmill.worker.process.startup import begin; begin()'; exit $?"
        done = subprocess.run(["bash", "-c", begin], cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 128 + signal.SIGKILL, done.stderr
        assert worker_id[0].registration.heartbeat(worker_id[1], beat=5.0) == before

    def test_an_order_of_another_batchmill_ends_the_worker_in_words(
        self, worker_id: tuple[Store, int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        order = json.loads(os.environ[ORDER_VARIABLE]) | {"form": 3}
        monkeypatch.setenv(ORDER_VARIABLE, json.dumps(order))
        monkeypatch.setattr(startup, "configure_logs", lambda **_: None)
        state, error = self.gave_up(worker_id[0])
        assert state is WorkerState.FAILED
        assert "start the worker again" in str(error)

    def test_a_device_that_another_process_holds_is_refused(
        self, worker_id: tuple[Store, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(startup, "describe_devices", lambda devices: (DeviceInfo("fake", "GPU-7", 1, "cpu"),))
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
        monkeypatch.setattr(startup, "describe_devices", lambda devices: (DeviceInfo("fake", "GPU-7", 1, "cpu"),))
        monkeypatch.setattr(device_lock, "_MACHINES_FOLDER", tmp_path)
        monkeypatch.setattr(device_lock, "_PATIENCE_SECONDS", 0.1)
        begun = startup.begin()
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

        monkeypatch.setattr(startup, "describe_devices", describe)
        state, error = self.gave_up(worker_id[0])
        assert (state, error) == (WorkerState.SICK, "cannot load it")

    def test_a_device_that_cannot_even_be_described_makes_the_worker_sick(
        self, worker_id: tuple[Store, int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def describe(devices: Sequence[str]) -> tuple[DeviceInfo, ...]:
            raise RuntimeError("CUDA error: device-side assert triggered")

        monkeypatch.setattr(startup, "describe_devices", describe)
        state, error = self.gave_up(worker_id[0])
        assert state is WorkerState.SICK
        assert "device-side assert" in str(error)

    def test_too_little_memory_is_no_sickness(
        self, worker_id: tuple[Store, int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def describe(devices: Sequence[str]) -> tuple[DeviceInfo, ...]:
            raise ModelError("too large") from RuntimeError("CUDA error: out of memory")

        monkeypatch.setattr(startup, "describe_devices", describe)
        assert self.gave_up(worker_id[0])[0] is WorkerState.FAILED


class TestBoundToAJob:
    """A worker of one job, which it can take only with the model that the job was begun with."""

    A = Adapter("a", "/adapters/a", identity="weights=1")

    @pytest.fixture
    def job(self, store: Store) -> Job:
        job_id = mill.load_named(store, "a", "a", batch_size=1)
        mill.claim(store, mill.session(store, identity="weights=1", adapters=[self.A]))
        return store.jobs.job(job_id)

    def held(self, identity: str, *adapters: Adapter) -> EngineFacts:
        return EngineFacts(EngineLimits("echo", 8), identity, adapters=adapters)

    def test_the_same_model_and_adapters_are_taken(self, job: Job) -> None:
        startup._refuse_other(job, self.held("weights=1", self.A, Adapter("b", "/adapters/b", identity="weights=9")))
        startup._refuse_other(replace(job, identity=None, adapters=()), self.held("weights=2"))

    @pytest.mark.parametrize(
        ("identity", "adapter", "changed"),
        [("weights=2", "weights=1", "weights"), ("weights=1", "weights=2", "adapter a")],
    )
    def test_another_one_ends_the_worker(self, job: Job, identity: str, adapter: str, changed: str) -> None:
        held = self.held(identity, replace(self.A, identity=adapter))
        with pytest.raises(ModelError, match=f"was begun with another model, changed since: {changed}; put the old"):
            startup._refuse_other(job, held)
