"""The process that holds the model: loads it, says so in the store, and works when it is woken.

It is started by spawn, so it takes what it is from the environment that its parent prepared.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from time import monotonic
from types import FrameType
from typing import NoReturn

from batchmill.jobs.broker.client import Broker
from batchmill.jobs.configuration.settings import Settings, load_settings
from batchmill.jobs.errors import AlreadyRunning, ModelError, NotFound, StoreError
from batchmill.jobs.models.adapters import from_json
from batchmill.jobs.models.device_memory import Memory
from batchmill.jobs.models.identity import differences
from batchmill.jobs.models.spec import ModelSpec
from batchmill.jobs.requests.states import WorkerState
from batchmill.jobs.runtime.failpoints import arm, failpoint
from batchmill.jobs.runtime.logs import configure_logs, get_logger
from batchmill.jobs.runtime.process.parent_death import die_with_parent
from batchmill.jobs.runtime.waiting import tell_by
from batchmill.jobs.store.leases.lease import Seat
from batchmill.jobs.store.store import Store
from batchmill.jobs.store.views.jobs import Job
from batchmill.jobs.store.workers import Loaded
from batchmill.worker.devices.lock import DeviceLocks
from batchmill.worker.devices.memory import MemoryMeter
from batchmill.worker.devices.nvml import Nvml
from batchmill.worker.devices.placement import TOGETHER, Placement
from batchmill.worker.devices.selection import DeviceInfo, describe_devices, is_device_error
from batchmill.worker.loop.outage import outlast
from batchmill.worker.loop.rounds import Rounds
from batchmill.worker.loop.runner import Runner
from batchmill.worker.loop.saver import Saver
from batchmill.worker.loop.spool import Spool, Spools
from batchmill.worker.models.sources import Sources
from batchmill.worker.process.held import Held, hold, import_libraries
from batchmill.worker.process.maintenance.reconciler import Reconciler
from batchmill.worker.process.maintenance.waker import Waker
from batchmill.worker.process.pulse import Pulse
from batchmill.worker.process.versions import versions
from batchmill.worker.process.watchdog import tell_stacks_when_asked

log = get_logger(__name__)
#: How a parent tells its child who it is; JSON of ChildOrder. Not a setting of the user's.
ORDER_VARIABLE = "_BATCHMILL_CHILD"
#: How a parent tells its child to hand everything back.
DRAIN_SIGNAL = signal.SIGUSR2


@dataclass(frozen=True, slots=True)
class ChildOrder:
    """What a parent orders its child to be.

    `spec` is canonical, `placement` the JSON of a Placement, `adapters` that of jobs.models.adapters, `pulse` the path
    of the Pulse that it beats, `log_file` the worker's.
    """

    worker_id: int
    spec: str
    placement: str
    only_job: str | None
    share_device: bool
    adapters: str | None
    pulse: str
    log_file: str
    parent_pid: int

    def to_environment(self) -> str:
        return json.dumps(astuple(self))

    @classmethod
    def from_environment(cls) -> ChildOrder:
        return cls(*json.loads(os.environ[ORDER_VARIABLE]))


class Child:
    """One child of one worker, with its engine, and with its devices for as long as it lives."""

    def __init__(
        self,
        runner: Runner,
        sources: Sources,
        *,
        finds_work: Callable[[], bool] = lambda: False,
        look_seconds: float | None = None,
        drain: threading.Event | None = None,
        locks: DeviceLocks | None = None,
    ) -> None:
        self._runner = runner
        self._sources = sources
        self._drain = drain or threading.Event()
        self._locks = locks
        self._rounds = Rounds(self.work, finds_work, every_seconds=look_seconds)

    def start(self) -> None:
        """From now on it works, also for what it finds by itself every `look_seconds`."""
        self._rounds.start()

    def wake(self) -> None:
        """Works for what a wake-up told of; returns when there is no more work."""
        self._rounds.wake()

    def finish(self) -> None:
        """Hands back what is at work, and returns when nothing is."""
        self._drain.set()
        self._rounds.finish()

    def work(self) -> None:
        """Works while there is work. An engine that fails ends the process: its device may be broken for good."""
        failpoint("child.woken")
        try:
            self._runner.run()
            if not self._sources.are_untouched():
                self._end_if_changed()
                self._runner.run()  # for the jobs that it left until it was known that the files are the same
        except Exception:
            log.exception("the engine failed; this process ends, and its batches are taken back")
            os._exit(1)

    def _end_if_changed(self) -> None:
        """Ends the process where another model lies in the files by now; the next one loads that."""
        changed = self._sources.changed()
        if changed is not None:
            log.warning("the model's files have changed; this process ends, and the next one loads them", what=changed)
            os._exit(0)


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
    order = ChildOrder.from_environment()
    # Nobody would see to it: it could hang for ever, with its device in its hands.
    die_with_parent(signal.SIGKILL, order.parent_pid)
    switch = _DrainSwitch()
    settings = load_settings()
    configure_logs(level=settings.log_level, form=settings.log_format, file=Path(order.log_file))
    tell_by(log.warning)
    arm(settings.failpoint, home=settings.home)
    store = Store(settings.database, busy_seconds=settings.worker_busy_seconds)
    generation = outlast(lambda: store.workers.new_generation(order.worker_id, child_pid=os.getpid()))
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
    pulse = Pulse.of(order.pulse)
    tell_stacks_when_asked(pulse)
    placement = Placement.from_json(order.placement)
    began = monotonic()
    with pulse.watching(settings.load_stall_seconds):
        devices = describe_devices(placement.devices)
        import_libraries(spec)
    torch_seconds = monotonic() - began
    outlast(lambda: store.workers.imported(order.worker_id, generation, seconds=torch_seconds))
    locks = DeviceLocks([] if order.share_device else [each.uuid for each in devices if each.uuid is not None])
    locks.take()
    # What fits is counted in the engine's own unit, so that each choice of one has a figure of its own.
    capacity_of = f"{_uuid(devices) or f'{socket.gethostname()}/{devices[0].torch_device}'}/{settings.engine}"
    fits = outlast(lambda: store.health.fits(spec, capacity_of))
    meter = MemoryMeter(devices, nvml=Nvml.open())

    def progress() -> bool:
        pulse.beat()
        meter.observe()
        return switch.asked.is_set()

    with pulse.watching(settings.load_stall_seconds):
        held = hold(
            spec,
            placement,
            devices,
            adapters=from_json(order.adapters),
            settings=settings,
            progress=progress,
            fits=fits,
        )
    if order.only_job is not None:
        job_id = order.only_job
        with suppress(NotFound):  # its file is still being read, so nobody has begun it
            _refuse_other(outlast(lambda: store.reading.job(job_id)), held)
    meter.loaded(held.weights_by_device, held.cache_by_device)
    loaded = _loaded(held, devices, meter.take())
    outlast(lambda: store.workers.loaded(order.worker_id, generation, loaded=loaded))
    waker = Waker(Reconciler.of(settings, store, Broker.of(settings)).send_wakeups)
    waker.start()

    def give_up(reason: str) -> None:
        _end_worker(store, order.worker_id, reason, drain=switch.asked)

    # A worker of one job alone works it off with what it has loaded.
    sources = Sources(held.sources if order.only_job is None else (), at_work=held.at_work, give_up=give_up)
    spools = Spools(settings.home, outlast(lambda: store.id), database=settings.database)
    saver = Saver(
        store,
        _seat(order, generation, held, devices, settings),
        rows=held.chosen.engine.rows,
        save_seconds=settings.save_seconds,
        peak=meter.take,
        wake=waker.wake,
        drain=switch.asked,
        spool=Spool(spools.path(order.worker_id, generation), limit_bytes=settings.spool_bytes),
        capacity_of=capacity_of,
        may_begin=sources.are_untouched,
    )
    saver.start()
    _say_ready(order, loaded, torch_seconds)
    waker.wake()
    runner = Runner(
        held.chosen.engine,
        saver,
        watching=lambda: pulse.watching(settings.stall_seconds),
        is_whole=sources.are_whole,
    )

    def finds_work() -> bool:
        try:
            return not switch.asked.is_set() and bool(
                store.recovery.pending_of(spec, most=1, worker_id=order.worker_id)
            )
        except StoreError:
            return False  # the keeper tells of it

    return Child(
        runner,
        sources,
        finds_work=finds_work,
        look_seconds=settings.reconcile_seconds,
        drain=switch.asked,
        locks=locks,
    )


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
        held.identity,
        model_load_seconds=held.load_seconds,
        model_commit=held.commit,
        device_uuid=_uuid(devices),
        defaults=held.chosen.engine.defaults,
        versions=versions(),
        only_job=order.only_job,
        adapters=held.adapters,
        kinds=held.chosen.engine.kinds,
    )


def _loaded(held: Held, devices: Sequence[DeviceInfo], memory: Memory) -> Loaded:
    return Loaded(
        TOGETHER.join(dict.fromkeys(each.name for each in devices)),
        _uuid(devices),
        held.load_seconds,
        sum(held.weights_by_device),
        versions(),
        held.identity,
        engine=held.chosen.kind,
        engine_rows=held.chosen.engine.rows,
        context_tokens=held.chosen.context_tokens,
        cache_tokens=held.chosen.cache_tokens,
        devices=memory.devices,
        adapters=held.adapters,
        kinds=held.chosen.engine.kinds,
    )


def _refuse_other(job: Job, held: Held) -> None:
    """Raises ModelError for a job that was begun with another model or adapter: this worker could never take it."""
    changed = [] if job.identity in (None, held.identity) else [differences(job.identity, held.identity)]
    by_name = {each.name: each for each in held.adapters}
    changed += [f"adapter {each.name}" for each in job.adapters if not each.agrees_with(by_name.get(each.name, each))]
    if changed:
        raise ModelError(
            f"job {job.id} was begun with another model, changed since: {', '.join(changed)}; put the old files back, "
            f"or run it anew and close this one by `batchmill cancel {job.id}`"
        )


def _say_ready(order: ChildOrder, loaded: Loaded, torch_seconds: float) -> None:
    log.info(
        "ready",
        worker=order.worker_id,
        model=str(ModelSpec.from_canonical(order.spec)),
        device=loaded.device_name,
        torch_seconds=round(torch_seconds, 3),
        load_seconds=loaded.model_load_seconds,
        engine=loaded.engine,
        rows=loaded.engine_rows,
        context_tokens=loaded.context_tokens,
        cache_tokens=loaded.cache_tokens,
    )


def _end_worker(store: Store, worker_id: int, reason: str, *, drain: threading.Event) -> None:
    """Ends the worker after this process has handed everything back."""
    log.error("the worker ends", worker=worker_id, reason=reason)
    outlast(lambda: store.workers.enter(worker_id, WorkerState.FAILED, error=reason))
    drain.set()
    os.kill(os.getppid(), signal.SIGTERM)


def _give_up(store: Store, worker_id: int, reason: str, *, sick: bool = False) -> NoReturn:
    """Says why, ends the parent, and waits for the parent's order to end.

    An exception here would be swallowed by Celery, and an exit would be answered by a new child, for ever.
    """
    if sick:
        outlast(lambda: store.health.enter_sick(worker_id, reason=reason))
    else:
        outlast(lambda: store.workers.enter(worker_id, WorkerState.FAILED, error=reason))
    os.kill(os.getppid(), signal.SIGTERM)
    while True:
        signal.pause()
