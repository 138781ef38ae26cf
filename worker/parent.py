"""A worker's parent process: prepares the child's environment, runs Celery beside the keeper, and says how it ended.

It imports no torch. Celery's pool spawns the one child that holds the model, and spawns another when it dies.
"""

from __future__ import annotations

import os
import signal
import socket
import warnings
from typing import Any

from celery.exceptions import SecurityWarning
from celery.signals import worker_shutting_down
from kombu import Queue

from jobs.adapters import to_json
from jobs.broker import Broker, make_app
from jobs.errors import BatchmillError, ModelError
from jobs.logs import get_logger
from jobs.settings import Settings, environment_of
from jobs.spec import ECHO, ModelSpec
from jobs.store import Store
from migrations import open_store
from worker.child import DRAIN_SIGNAL, ORDER_VARIABLE, ChildOrder
from worker.devices import CPU, visible_devices
from worker.keeper import Keeper, Pool, WorkerOptions
from worker.placement import TOGETHER, Placement

log = get_logger(__name__)
#: Celery gives a child so much longer than the watchdog to load its model.
_ALIVE_MARGIN_SECONDS = 60
#: Celery gives no task to a new child while it waits for the dead one's result, of which there is none.
_LOST_WAIT_SECONDS = 0.1


def run_worker(options: WorkerOptions, settings: Settings) -> None:
    """Runs one worker until it is told to end. Raises BatchmillError when it cannot work."""
    placement = Placement((CPU,)) if options.spec.model == ECHO else options.placement
    device = placement.written
    os.environ["CUDA_VISIBLE_DEVICES"] = visible_devices(placement.devices, os.environ)
    os.environ.update(environment_of(settings))
    # torch's threads wait asleep: awake they take the very cores that the slowest of them waits for, and beside one
    # other busy process a CPU generates a hundred times slower. Read when the child loads torch.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    open_store(settings).close()
    store = Store(settings.database, busy_seconds=settings.worker_busy_seconds)
    broker = Broker.of(settings)
    if settings.embedded_broker:
        _check_embedded(broker, settings)
    name = options.name or f"{device.replace(':', '').replace(TOGETHER, '-')}-{os.getpid()}"
    celery_worker = _celery_worker(settings, options.spec, name)
    worker_id = store.workers.register(
        host=socket.gethostname(),
        name=name,
        pid=os.getpid(),
        spec=options.spec,
        device=device,
        only_job=options.only_job,
        beat=settings.heartbeat_seconds,
        adapters=options.adapters,
    )
    keeper = Keeper(store, broker, worker_id, options=options, settings=settings, pool=Pool(celery_worker))
    try:
        order = ChildOrder(
            worker_id,
            options.spec.canonical,
            placement.to_json(),
            options.only_job,
            options.share_device,
            to_json(options.adapters),
        )
        os.environ[ORDER_VARIABLE] = order.to_environment()
        # A child inherits this: it would die of the signal, were it told to hand back before it can.
        signal.signal(DRAIN_SIGNAL, signal.SIG_IGN)
        worker_shutting_down.connect(keeper.on_shutdown, weak=False)
        log.info("worker starts", worker=worker_id, name=name, model=str(options.spec), device=device)
        keeper.start()
        celery_worker.start()
    finally:
        keeper.finish()
    if keeper.failure is not None:
        raise ModelError(keeper.failure)
    if celery_worker.exitcode and not keeper.draining:
        raise BatchmillError("the worker ended by itself; the lines above say why")


def _check_embedded(broker: Broker, settings: Settings) -> None:
    try:
        broker.ping()
    except BatchmillError as error:
        raise BatchmillError(
            f"no embedded Redis is running in {settings.home}: start `batchmill up`, "
            "or name a Redis by BATCHMILL_BROKER_URL"
        ) from error


def _celery_worker(settings: Settings, spec: ModelSpec, name: str) -> Any:
    # Celery's advice against root is about pickle; JSON alone is accepted here.
    warnings.filterwarnings("ignore", category=SecurityWarning)
    app = make_app(settings.broker, ca_file=settings.broker_ca_file, insecure=settings.broker_insecure)
    app.conf.update(
        task_queues=[Queue(spec.queue)],
        include=["worker.app"],
        worker_lost_wait=_LOST_WAIT_SECONDS,
        worker_proc_alive_timeout=settings.load_stall_seconds + _ALIVE_MARGIN_SECONDS,
    )
    return app.Worker(
        hostname=f"{name}@{socket.gethostname()}",
        loglevel="WARNING",
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=True,
        quiet=True,
    )
