"""The process that holds the model: loads it, says so in the store, and works when it is woken.

It is started by spawn, so it takes what it is from the environment that its parent prepared.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from types import FrameType
from typing import NoReturn, TypeVar

from jobs.adapters import from_json
from jobs.broker import Broker
from jobs.errors import AlreadyRunning, ModelError, StoreError
from jobs.failpoints import arm, failpoint
from jobs.logs import configure_logs, get_logger
from jobs.memory import Memory
from jobs.settings import Settings, load_settings
from jobs.spec import ModelSpec
from jobs.states import WorkerState
from jobs.store import Store
from jobs.store.lease import Seat
from jobs.store.workers import Loaded
from worker.device_lock import DeviceLocks
from worker.devices import DeviceInfo, describe_devices, is_device_error
from worker.held import Held, hold
from worker.nvml import Nvml
from worker.placement import TOGETHER, Placement
from worker.reconciler import Reconciler
from worker.runner import Runner
from worker.saver import Saver
from worker.spool import Spool, spool_path
from worker.telemetry import MemoryMeter
from worker.versions import versions
from worker.waker import Waker
from worker.watchdog import Watchdog

log = get_logger(__name__)
T = TypeVar("T")
#: How a parent tells its child who it is; JSON of ChildOrder. Not a setting of the user's.
ORDER_VARIABLE = "_BATCHMILL_CHILD"
#: How a parent tells its child to hand everything back.
DRAIN_SIGNAL = signal.SIGUSR2
_STORE_PAUSE_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class ChildOrder:
    """What a parent orders its child to be.

    `spec` is canonical, `placement` the JSON of worker.placement, `adapters` that of jobs.adapters.
    """

    worker_id: int
    spec: str
    placement: str
    only_job: str | None
    share_device: bool
    adapters: str | None = None

    def to_environment(self) -> str:
        return json.dumps(astuple(self))

    @classmethod
    def from_environment(cls) -> ChildOrder:
        return cls(*json.loads(os.environ[ORDER_VARIABLE]))


class Child:
    """One child of one worker, with its engine, and with its devices for as long as it lives."""

    def __init__(self, runner: Runner, locks: DeviceLocks | None = None) -> None:
        self._runner = runner
        self._locks = locks

    def work(self) -> None:
        """Works while there is work. An engine that fails ends the process: its device may be broken for good."""
        failpoint("child.woken")
        try:
            self._runner.run()
        except Exception:
            log.exception("the engine failed; this process ends, and its batches are taken back")
            os._exit(1)


class _DrainSwitch:
    """What the drain signal does: it ends a process that is still loading, and stops one that works."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self._loaded = False
        signal.signal(DRAIN_SIGNAL, self._on_signal)

    def loaded(self) -> None:
        self._loaded = True

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self.asked.set()
        if not self._loaded:
            os._exit(0)


def begin() -> Child:
    """Loads the model of this process. A model that cannot be loaded ends the worker, not only this process."""
    switch = _DrainSwitch()
    settings = load_settings()
    configure_logs(settings)
    arm(settings.failpoint, home=settings.home)
    order = ChildOrder.from_environment()
    store = Store(settings.database, busy_seconds=settings.worker_busy_seconds)
    generation = _answered(lambda: store.workers.new_generation(order.worker_id, child_pid=os.getpid()))
    try:
        child = _load(order, generation, settings=settings, store=store, switch=switch)
    except (ModelError, AlreadyRunning) as error:
        _give_up(store, order.worker_id, str(error), sick=is_device_error(error))
    except Exception as error:
        log.exception("this process cannot begin")
        _give_up(store, order.worker_id, f"{type(error).__name__}: {error}", sick=is_device_error(error))
    switch.loaded()
    return child


def _load(order: ChildOrder, generation: int, *, settings: Settings, store: Store, switch: _DrainSwitch) -> Child:
    spec = ModelSpec.from_canonical(order.spec)
    watchdog = Watchdog()
    placement = Placement.from_json(order.placement)
    devices = describe_devices(placement.devices)
    locks = DeviceLocks([] if order.share_device else [each.uuid for each in devices if each.uuid is not None])
    locks.take()
    # What fits is counted in the engine's own unit, so that each choice of one has a figure of its own.
    capacity_of = f"{_uuid(devices) or f'{socket.gethostname()}/{devices[0].torch_device}'}/{settings.engine}"
    fits = _answered(lambda: store.health.fits(spec, capacity_of))
    meter = MemoryMeter(devices, nvml=Nvml.open())

    def progress() -> bool:
        watchdog.rearm()
        meter.observe()
        return switch.asked.is_set()

    with watchdog.watching(settings.load_stall_seconds):
        held = hold(
            spec,
            placement,
            devices,
            adapters=from_json(order.adapters),
            settings=settings,
            progress=progress,
            fits=fits,
        )
    meter.loaded(held.weights_by_device, held.cache_by_device)
    loaded = _loaded(held, devices, meter.take())
    _answered(lambda: store.workers.loaded(order.worker_id, generation, loaded=loaded))
    waker = Waker(Reconciler(store, Broker.of(settings), lease_seconds=settings.lease_seconds).send_wakeups)
    waker.start()
    path = spool_path(settings.home, settings.database, order.worker_id, generation)
    saver = Saver(
        store,
        _seat(order, generation, held, devices, settings),
        rows=held.chosen.engine.rows,
        save_seconds=settings.save_seconds,
        peak=meter.take,
        wake=waker.wake,
        drain=switch.asked,
        spool=Spool(path, limit_bytes=settings.spool_bytes),
        capacity_of=capacity_of,
    )
    saver.start()
    _say_ready(order, loaded)
    waker.wake()
    return Child(Runner(held.chosen.engine, saver, watching=lambda: watchdog.watching(settings.stall_seconds)), locks)


def _answered(call: Callable[[], T]) -> T:
    """What a call of the store returns, tried until the store answers: a child must not die of its absence."""
    while True:
        try:
            return call()
        except StoreError as error:
            if not error.retryable:
                raise
            log.warning("the store is away; this process waits for it", error=str(error))
            time.sleep(_STORE_PAUSE_SECONDS)


def _uuid(devices: Sequence[DeviceInfo]) -> str | None:
    """The UUIDs of these devices together; None where they have none."""
    return TOGETHER.join(each.uuid for each in devices if each.uuid is not None) or None


def _seat(order: ChildOrder, generation: int, held: Held, devices: Sequence[DeviceInfo], settings: Settings) -> Seat:
    return Seat(
        order.worker_id,
        generation,
        ModelSpec.from_canonical(order.spec),
        TOGETHER.join(each.torch_device for each in devices),
        settings.lease_seconds,
        model_load_seconds=held.load_seconds,
        model_commit=held.commit,
        device_uuid=_uuid(devices),
        defaults=held.chosen.engine.defaults,
        versions=versions(),
        only_job=order.only_job,
        adapters=from_json(order.adapters),
    )


def _loaded(held: Held, devices: Sequence[DeviceInfo], memory: Memory) -> Loaded:
    return Loaded(
        TOGETHER.join(dict.fromkeys(each.name for each in devices)),
        _uuid(devices),
        held.load_seconds,
        sum(held.weights_by_device),
        versions(),
        engine=held.chosen.kind,
        engine_rows=held.chosen.engine.rows,
        context_tokens=held.chosen.context_tokens,
        cache_tokens=held.chosen.cache_tokens,
        devices=memory.devices,
    )


def _say_ready(order: ChildOrder, loaded: Loaded) -> None:
    log.info(
        "ready",
        worker=order.worker_id,
        model=str(ModelSpec.from_canonical(order.spec)),
        device=loaded.device_name,
        load_seconds=loaded.model_load_seconds,
        engine=loaded.engine,
        rows=loaded.engine_rows,
        context_tokens=loaded.context_tokens,
        cache_tokens=loaded.cache_tokens,
    )


def _give_up(store: Store, worker_id: int, reason: str, *, sick: bool = False) -> NoReturn:
    """Says why, ends the parent, and waits for the parent's order to end.

    An exception here would be swallowed by Celery, and an exit would be answered by a new child, for ever.
    """
    if sick:
        _answered(lambda: store.health.enter_sick(worker_id, reason=reason))
    else:
        _answered(lambda: store.workers.enter(worker_id, WorkerState.FAILED, error=reason))
    os.kill(os.getppid(), signal.SIGTERM)
    while True:
        signal.pause()
