"""The start of the process that holds the model: opens the engine, tells the store, and makes it ready for work.

The process is spawned, so it reads its order from the environment that its parent prepared.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, NoReturn

from batchmill.jobs.broker.client import Broker
from batchmill.jobs.configuration.settings import Settings, load_settings
from batchmill.jobs.errors import AlreadyRunning, ModelError, NotFound, StoreError
from batchmill.jobs.models.adapters import from_json
from batchmill.jobs.models.digests import Digests
from batchmill.jobs.models.engine_facts import EngineFacts
from batchmill.jobs.models.identity import differences
from batchmill.jobs.models.spec import ModelSpec
from batchmill.jobs.requests.states import WorkerState
from batchmill.jobs.runtime.failpoints import arm
from batchmill.jobs.runtime.logs import configure_logs, get_logger
from batchmill.jobs.runtime.process.parent_death import die_with_parent
from batchmill.jobs.runtime.waiting import tell_by
from batchmill.jobs.store.store import Store
from batchmill.jobs.store.views.jobs import Job
from batchmill.worker.devices.lock import DeviceLocks
from batchmill.worker.devices.memory import MemoryMeter
from batchmill.worker.devices.nvml import Nvml
from batchmill.worker.devices.placement import Placement
from batchmill.worker.devices.selection import DeviceInfo, describe_devices, is_device_error
from batchmill.worker.engine import OpenEngine, Opening
from batchmill.worker.engine.options import EngineOptions
from batchmill.worker.engine.registry import kind_of
from batchmill.worker.loop.outage import outlast
from batchmill.worker.loop.runner import Runner
from batchmill.worker.loop.saver import Saver
from batchmill.worker.loop.spool import Spool, Spools
from batchmill.worker.models.sources import Sources
from batchmill.worker.process.announcement import loaded_of, say_ready, session_of, uuid_of
from batchmill.worker.process.child import Child
from batchmill.worker.process.drain import DrainSwitch
from batchmill.worker.process.maintenance.reconciler import Reconciler
from batchmill.worker.process.maintenance.waker import Waker
from batchmill.worker.process.maintenance.watchdog import tell_stacks_when_asked
from batchmill.worker.process.order import ChildOrder, ForeignOrder
from batchmill.worker.process.pulse import Pulse

if TYPE_CHECKING:
    import torch

    from batchmill.worker.models.load import BeforeWeights

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Start:
    """A process that starts: its order, and the means by which it follows it."""

    order: ChildOrder
    generation: int
    settings: Settings
    store: Store
    switch: DrainSwitch
    pulse: Pulse

    @property
    def spec(self) -> ModelSpec:
        """The model that it serves."""
        return ModelSpec.from_canonical(self.order.spec)

    def finds_work(self) -> bool:
        """Looks for work that no wake-up told of."""
        try:
            return not self.switch.asked.is_set() and bool(
                self.store.recovery.pending_of(self.spec, most=1, worker_id=self.order.worker_id)
            )
        except StoreError:
            return False  # the keeper tells of it

    def end_worker(self, reason: str) -> None:
        """Ends the worker after this process has handed everything back."""
        worker_id = self.order.worker_id
        log.error("the worker ends", worker=worker_id, reason=reason)
        outlast(lambda: self.store.registration.enter(worker_id, WorkerState.FAILED, error=reason))
        self.switch.asked.set()
        os.kill(os.getppid(), signal.SIGTERM)


def begin() -> Child:
    """Loads the model of this process. A model that cannot be loaded ends the worker, not only this process."""
    try:
        order = ChildOrder.from_environment()
    except ForeignOrder as error:
        _refuse(error)
    # Nobody would see to it: it could hang for ever, with its device in its hands.
    die_with_parent(signal.SIGKILL, order.parent_pid)
    switch = DrainSwitch()
    settings = load_settings()
    configure_logs(level=settings.log_level, form=settings.log_format, file=Path(order.log_file))
    tell_by(log.warning)
    arm(settings.failpoint, home=settings.home)
    store = Store(settings.database, busy_seconds=settings.worker_busy_seconds)
    generation = outlast(lambda: store.registration.new_generation(order.worker_id, child_pid=os.getpid()))
    try:
        child = _load(_Start(order, generation, settings, store, switch, Pulse.of(order.pulse)))
    except (ModelError, AlreadyRunning) as error:
        _give_up(store, order.worker_id, str(error), sick=is_device_error(error))
    except Exception as error:
        log.exception("this process cannot begin")
        _give_up(store, order.worker_id, f"{type(error).__name__}: {error}", sick=is_device_error(error))
    switch.loaded()
    return child


def _refuse(foreign: ForeignOrder) -> NoReturn:
    """Ends the worker of an order that this batchmill cannot follow."""
    die_with_parent(signal.SIGKILL, foreign.parent_pid)
    DrainSwitch()
    settings = load_settings()
    configure_logs(level=settings.log_level, form=settings.log_format)
    log.error("this process cannot begin", worker=foreign.worker_id, reason=str(foreign))
    store = Store(settings.database, busy_seconds=settings.worker_busy_seconds)
    _give_up(store, foreign.worker_id, str(foreign))


def _load(start: _Start) -> Child:
    """Opens the engine on devices that no other worker has, and says in the store what is open."""
    order, settings, store = start.order, start.settings, start.store
    tell_stacks_when_asked(start.pulse)
    placement = Placement.from_json(order.placement)
    began = monotonic()
    with start.pulse.watching(settings.load_stall_seconds):
        devices = describe_devices(placement.devices)
        kind = kind_of(start.spec, settings)
    torch_seconds = monotonic() - began
    outlast(lambda: store.registration.imported(order.worker_id, start.generation, seconds=torch_seconds))
    locks = DeviceLocks([] if order.share_device else [each.uuid for each in devices if each.uuid is not None])
    locks.take()
    meter = MemoryMeter(devices, nvml=Nvml.open())
    opening = _opening(start, placement, devices, meter)
    with start.pulse.watching(settings.load_stall_seconds):
        opened = kind.open(opening)
    if order.only_job is not None:
        job_id = order.only_job
        with suppress(NotFound):  # its file is still being read, so nobody has begun it
            _refuse_other(outlast(lambda: store.jobs.job(job_id)), opened.facts)
    meter.loaded(opened.facts.weights_by_device, opened.facts.cache_by_device)
    loaded = loaded_of(opened.facts, devices, meter.take())
    outlast(lambda: store.registration.loaded(order.worker_id, start.generation, loaded=loaded))
    child = _ready(start, opened, devices, meter, locks)
    say_ready(order, loaded, torch_seconds)
    return child


def _opening(start: _Start, placement: Placement, devices: Sequence[DeviceInfo], meter: MemoryMeter) -> Opening:
    """Puts together the order to the engine's kind."""

    def progress() -> bool:
        start.pulse.beat()
        meter.observe()
        return start.switch.asked.is_set()

    settings, capacity_of = start.settings, _capacity_of(start, devices)
    options = EngineOptions.of(settings)
    return Opening(
        start.spec,
        placement,
        [each.torch_device for each in devices],
        adapters=from_json(start.order.adapters),
        options=options,
        digests=Digests(settings.home, progress=progress),
        before_weights=_refusal(options),
        progress=progress,
        known_capacity=outlast(lambda: start.store.health.known_capacity(start.spec, capacity_of)),
    )


def _ready(
    start: _Start, opened: OpenEngine, devices: Sequence[DeviceInfo], meter: MemoryMeter, locks: DeviceLocks
) -> Child:
    """Puts the engine between its runner and its saver, which is started, and looks for work."""
    order, settings, store = start.order, start.settings, start.store
    waker = Waker(Reconciler.of(settings, store, Broker.of(settings)).send_wakeups)
    waker.start()
    # A worker of one job alone works it off with what it has loaded.
    contents = opened.sources if order.only_job is None else ()
    sources = Sources(contents, at_work=opened.read_at_work, give_up=start.end_worker)
    spools = Spools(settings.home, outlast(lambda: store.id), database=settings.database)
    saver = Saver(
        store,
        session_of(order, start.generation, settings, opened, devices),
        rows=opened.facts.limits.rows,
        admission_order=opened.engine.admission_order,
        save_seconds=settings.save_seconds,
        peak=meter.take,
        wake=waker.wake,
        drain=start.switch.asked,
        spool=Spool(spools.path(order.worker_id, start.generation), limit_bytes=settings.spool_bytes),
        capacity_of=_capacity_of(start, devices),
        may_begin=sources.are_untouched,
    )
    saver.start()
    waker.wake()
    runner = Runner(
        opened.engine,
        saver,
        watching=lambda: start.pulse.watching(settings.stall_seconds),
        is_whole=sources.are_whole,
    )
    return Child(
        runner,
        sources,
        finds_work=start.finds_work,
        look_seconds=settings.reconcile_seconds,
        drain=start.switch.asked,
        locks=locks,
        close=opened.engine.close,
    )


def _capacity_of(start: _Start, devices: Sequence[DeviceInfo]) -> str:
    """The name under which the store keeps what these devices hold.

    What fits is counted in the engine's own unit, so that each choice of one has a figure of its own.
    """
    return f"{uuid_of(devices) or f'{socket.gethostname()}/{devices[0].torch_device}'}/{start.settings.engine}"


def _refusal(options: EngineOptions) -> BeforeWeights:
    """The refusal of a model that does not fit; the plan is imported when it is asked, and with it torch."""

    def refuse(spec: ModelSpec, folder: Path, device: torch.device) -> None:
        from batchmill.worker.plan.refusal import refuse_too_large

        refuse_too_large(spec, folder, device, options)

    return refuse


def _refuse_other(job: Job, held: EngineFacts) -> None:
    """Raises ModelError for a job that was begun with another model or adapter: this worker could never take it."""
    changed = [] if job.identity in (None, held.identity) else [differences(job.identity, held.identity)]
    by_name = {each.name: each for each in held.adapters}
    changed += [f"adapter {each.name}" for each in job.adapters if not each.agrees_with(by_name.get(each.name, each))]
    if changed:
        raise ModelError(
            f"job {job.id} was begun with another model, changed since: {', '.join(changed)}; put the old files back, "
            f"or run it anew and close this one by `batchmill cancel {job.id}`"
        )


def _give_up(store: Store, worker_id: int, reason: str, *, sick: bool = False) -> NoReturn:
    """Says why, ends the parent, and waits for the parent's order to end.

    An exception here would be swallowed by Celery, and an exit would be answered by a new child, for ever.
    """
    if sick:
        outlast(lambda: store.health.enter_sick(worker_id, reason=reason))
    else:
        outlast(lambda: store.registration.enter(worker_id, WorkerState.FAILED, error=reason))
    os.kill(os.getppid(), signal.SIGTERM)
    while True:
        signal.pause()
