"""A worker's parent process: prepares the child's environment, runs Celery beside the keeper, and says how it ended.

It imports no torch. Celery's pool spawns the one child that holds the model, and spawns another when it dies.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from celery.signals import worker_shutting_down

from batchmill.jobs.advice import start_words
from batchmill.jobs.broker.client import Broker
from batchmill.jobs.broker.queue_name import queue_name
from batchmill.jobs.configuration.settings import Settings, environment_of
from batchmill.jobs.errors import BatchmillError, ModelError, StoreBusy
from batchmill.jobs.models.adapters import to_json
from batchmill.jobs.models.spec import ECHO, ModelSpec
from batchmill.jobs.runtime.home import use_store
from batchmill.jobs.runtime.log_file import log_path
from batchmill.jobs.runtime.logs import FILE_ONLY, configure_logs, get_logger
from batchmill.jobs.runtime.process.process import Process
from batchmill.jobs.runtime.process.signals import note_sigterm
from batchmill.jobs.store.store import Store
from batchmill.migrations.revisions import open_store
from batchmill.worker.devices.placement import TOGETHER, Placement
from batchmill.worker.devices.selection import CPU, visible_devices
from batchmill.worker.loop.outage import outlast
from batchmill.worker.process.celery_worker import make_celery_worker
from batchmill.worker.process.drain import DRAIN_SIGNAL
from batchmill.worker.process.maintenance.keeper import Keeper
from batchmill.worker.process.maintenance.namesakes import Namesakes
from batchmill.worker.process.maintenance.pool import Pool
from batchmill.worker.process.maintenance.watchdog import Watchdog
from batchmill.worker.process.order import ORDER_VARIABLE, ChildOrder
from batchmill.worker.process.own_log import make_place
from batchmill.worker.process.pulse import Pulse
from batchmill.worker.process.worker_options import WorkerOptions

log = get_logger(__name__)


def run_worker(options: WorkerOptions, settings: Settings) -> None:
    """Runs one worker until it is told to end. Raises BatchmillError when it cannot work."""
    placement = Placement((CPU,)) if options.spec.model == ECHO else options.placement
    device = placement.written
    name = options.name or f"{device.replace(':', '').replace(TOGETHER, '-')}-{os.getpid()}"
    hindrance = make_place(settings.home, name)
    configure_logs(level=settings.log_level, form=settings.log_format, file=log_path(settings.home, name))
    os.environ["CUDA_VISIBLE_DEVICES"] = visible_devices(placement.devices, os.environ)
    os.environ.update(environment_of(settings))
    # torch's threads wait asleep: awake they take the very cores that the slowest of them waits for, and beside one
    # other busy process a CPU generates a hundred times slower. Read when the child loads torch.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        # A wait for a lock of SQLite hears no signal, so this process waits there only briefly.
        impatient = settings.model_copy(update={"busy_seconds": settings.worker_busy_seconds})
        store = outlast(lambda: open_store(impatient), kind=StoreBusy)
        if hindrance is not None:
            log.warning("this worker keeps no log file", error=hindrance)
        with use_store(settings.home) if settings.embedded_store else nullcontext():
            _run(options, placement, name=name, settings=settings, store=store)
    except BatchmillError as error:
        get_logger(FILE_ONLY).error("the worker ends", reason=str(error))
        raise


def _run(options: WorkerOptions, placement: Placement, *, name: str, settings: Settings, store: Store) -> None:
    device = placement.written
    broker = Broker.of(settings)
    if settings.embedded_broker:
        _check_embedded(broker, options.spec, settings, adapters=[str(each) for each in options.adapters])
    celery_worker = make_celery_worker(settings, queue=queue_name(options.spec, outlast(lambda: store.id)), name=name)
    process = Process.own()
    worker_id = outlast(
        lambda: store.registration.register(
            host=socket.gethostname(),
            name=name,
            pid=os.getpid(),
            spec=options.spec,
            device=device,
            only_job=options.only_job,
            beat=settings.heartbeat_seconds,
            adapters=options.adapters,
            process=process,
        )
    )
    asked_to_end = note_sigterm()  # until Celery's handler stands: there is a row now, and soon a child
    pool, pulse = Pool(celery_worker), Pulse.create()
    namesakes = Namesakes(store, broker, worker_id, name=f"{name} on {socket.gethostname()}", process=process)
    keeper = Keeper(
        store,
        broker,
        worker_id,
        options=options,
        settings=settings,
        pool=pool,
        asked_to_end=asked_to_end,
        namesakes=namesakes,
    )
    try:
        order = _order(options, placement, worker_id, pulse, log_path(settings.home, name))
        os.environ[ORDER_VARIABLE] = order.to_environment()
        # A child inherits this: otherwise it would die of the signal, if it is told to drain before it can.
        signal.signal(DRAIN_SIGNAL, signal.SIG_IGN)
        worker_shutting_down.connect(keeper.on_shutdown, weak=False)
        worker_shutting_down.connect(partial(_tell_of_end, keeper), weak=False)
        log.info("worker starts", worker=worker_id, name=name, model=str(options.spec), device=device)
        keeper.start()
        Watchdog(pulse, pids=pool.pids).start()
        celery_worker.start()
    finally:
        keeper.finish()
    if keeper.failure is not None:
        raise ModelError(keeper.failure)
    if celery_worker.exitcode and not keeper.draining:
        raise BatchmillError("the worker ended by itself; the lines above say why")


def _tell_of_end(keeper: Keeper, **_: object) -> None:
    """Logs it from a thread of its own: the signal may have come in the middle of another line."""
    if keeper.failure is not None:
        return  # the failure says why the worker ends
    line = "stopping: finished outputs are saved, the rest returns to the queue"
    threading.Thread(target=log.info, args=[line]).start()


def _order(options: WorkerOptions, placement: Placement, worker_id: int, pulse: Pulse, log_file: Path) -> ChildOrder:
    return ChildOrder(
        worker_id,
        options.spec.canonical,
        placement.to_json(),
        options.only_job,
        options.share_device,
        to_json(options.adapters),
        pulse.path,
        str(log_file),
        os.getpid(),
    )


def _check_embedded(broker: Broker, spec: ModelSpec, settings: Settings, *, adapters: Sequence[str]) -> None:
    try:
        broker.ping()
    except BatchmillError as error:
        words = start_words(spec, settings, adapters=adapters)
        instead = f"`{shlex.join(words)}` starts one, or " if words[1] == "up" else ""
        raise BatchmillError(
            f"no embedded Redis is running in {settings.home}: {instead}name a Redis by BATCHMILL_BROKER_URL"
        ) from error
