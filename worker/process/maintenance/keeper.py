"""The parent's main thread: keeps the worker's heartbeat, sees to dead children and orphans, and reconciles.

It logs and outlives an outage of the store or of Redis. It imports no torch, and starts no process: Celery's pool
spawns a child in the place of one that died.
"""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from time import monotonic

from batchmill.jobs.broker.client import Broker
from batchmill.jobs.broker.queue_name import old_queue_name
from batchmill.jobs.configuration.settings import Settings
from batchmill.jobs.errors import BrokerUnavailable, StoreCrowded, StoreError
from batchmill.jobs.requests.states import RunOutcome, WorkerState
from batchmill.jobs.runtime.logs import get_logger
from batchmill.jobs.runtime.process.process import end_of
from batchmill.jobs.store.store import Store
from batchmill.jobs.store.workers.liveness import GIVEN_UP
from batchmill.jobs.store.workers.registration import Heartbeat
from batchmill.worker.process.drain import DRAIN_SIGNAL
from batchmill.worker.process.maintenance.early_deaths import EarlyDeaths
from batchmill.worker.process.maintenance.leftovers import Leftovers
from batchmill.worker.process.maintenance.namesakes import Namesakes
from batchmill.worker.process.maintenance.pool import Pool, is_running
from batchmill.worker.process.maintenance.reconciler import Reconciler
from batchmill.worker.process.maintenance.waker import Waker
from batchmill.worker.process.worker_options import WorkerOptions

log = get_logger(__name__)
#: The interval at which the keeper looks after its child.
_TICK_SECONDS = 0.25
#: The number of children in a row that die while they load the model, after which the worker ends.
_MAX_FAILED_LOADS = 3
#: The longest that an ending worker waits for its last wake-ups to be sent.
_LAST_WAKE_SECONDS = 1.0
#: The longest that an ending worker waits for a look after its child that an absent store holds up.
_LAST_LOOK_SECONDS = 2.0
#: The time for which a worker's row tells of a server that had no connection left for it.
_CROWDED_SECONDS = 60.0


@dataclass(slots=True)
class _Due:
    """A repeated task and its next time, on this process's clock."""

    every_seconds: float
    at: float = field(default_factory=monotonic)

    def now(self) -> bool:
        if monotonic() < self.at:
            return False
        self.at = monotonic() + self.every_seconds
        return True


class Keeper:
    """Looks after one worker, for the life of its parent process."""

    def __init__(
        self,
        store: Store,
        broker: Broker,
        worker_id: int,
        *,
        options: WorkerOptions,
        settings: Settings,
        pool: Pool,
        asked_to_end: threading.Event,
        namesakes: Namesakes,
    ) -> None:
        self.failure: str | None = None
        self._store = store
        self._worker_id = worker_id
        self._options = options
        self._settings = settings
        self._pool = pool
        self._reconciler = Reconciler.of(settings, store, broker)
        self._leftovers = Leftovers(store, settings)
        self._broker = broker
        self._namesakes = namesakes
        self._waker = Waker(self._wake)
        #: The queue from before each store had its own, until it is deleted.
        self._old_queue: str | None = old_queue_name(options.spec)
        self._heartbeat_due = _Due(settings.heartbeat_seconds)
        self._reconcile_due = _Due(settings.reconcile_seconds)
        self._last = Heartbeat(WorkerState.STARTING, 0, None, None, 0)
        #: Nothing is left of the children up to this generation.
        self._settled = 0
        #: The store did not answer last time.
        self._away = False
        #: The hindrance in the worker's row, and its end on this process's clock.
        self._hindrance, self._hindered_until = "", 0.0
        self._failed_loads = 0
        self._early = EarlyDeaths(pool.pids, is_running)
        self._idle_since = monotonic()
        #: SIGTERM came before Celery could hear it.
        self._asked_to_end = asked_to_end
        self._draining = threading.Event()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="keeper", daemon=True)

    @property
    def draining(self) -> bool:
        """True once the worker was told to end."""
        return self._draining.is_set()

    def start(self) -> None:
        self._waker.start()
        self._thread.start()

    def on_shutdown(self, **_: object) -> None:
        """Drains the child when Celery is told to end; the child has `drain_seconds` to hand everything back."""
        if self._draining.is_set():
            return
        self._draining.set()
        self._pool.signal(DRAIN_SIGNAL)
        deadline = threading.Timer(self._settings.drain_seconds, self._pool.signal, [signal.SIGKILL])
        deadline.daemon = True
        deadline.start()

    def finish(self) -> None:
        """Takes back whatever the children still held after Celery has ended, and enters that in the row."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(timeout=_LAST_LOOK_SECONDS)
        self._pool.signal(signal.SIGKILL)
        if self._away or self._thread.is_alive():
            log.warning("the store is away; others take back what is left", worker=self._worker_id)
            return
        try:
            self._beat()
            # Requests that a draining child did not hand back in time were cut short, and are not to blame.
            self._settle(self._last.generation, RunOutcome.RELEASED if self._draining.is_set() else RunOutcome.CRASHED)
            if self.failure is None:
                self._store.registration.enter(self._worker_id, WorkerState.STOPPED)
        except StoreError as error:
            log.warning(f"{error.hindrance}; others take back what is left", worker=self._worker_id, error=str(error))
        self._waker.wait(seconds=_LAST_WAKE_SECONDS)

    def _run(self) -> None:
        try:
            self._keep()
        except Exception:
            log.exception("the keeper failed; this process ends, and others take back what its child holds")
            os._exit(1)

    def _keep(self) -> None:
        told = False
        while not self._over.wait(_TICK_SECONDS):
            if self._asked_to_end.is_set() and not self._draining.is_set():
                os.kill(os.getpid(), signal.SIGTERM)
            try:
                if self._draining.is_set():
                    self._pool.signal(DRAIN_SIGNAL)  # again: a child that has just been started may have missed it
                if self._draining.is_set() and not told:
                    self._store.registration.enter(self._worker_id, WorkerState.DRAINING)
                    told = True
                self._look_after()
                self._away = False
            except StoreError as error:
                self._away = True
                if not error.retryable:
                    self.failure = str(error)
                    os.kill(os.getpid(), signal.SIGTERM)
                    return
                if isinstance(error, StoreCrowded):
                    self._hindrance, self._hindered_until = str(error), monotonic() + _CROWDED_SECONDS
                log.warning(error.hindrance, worker=self._worker_id, error=str(error))
                self._over.wait(1.0)

    def _look_after(self) -> None:
        child_died = not self._draining.is_set() and self._has_died()
        if self._heartbeat_due.now() or child_died:
            self._beat()
        if child_died:
            self._on_death()
        if not self._draining.is_set() and self._early.happened():
            self._on_early_death()
        if self._reconcile_due.now():
            self._leftovers.settle_orphans()
            self._leftovers.discard_abandoned()
            self._reconciler.repair()
            self._waker.wake()
        self._end_when_idle()

    def _wake(self) -> None:
        """Does what needs Redis, on the waker's thread, since Redis may hang."""
        self._reconciler.send_wakeups()
        self._namesakes.look()
        if self._old_queue is not None:
            with suppress(BrokerUnavailable):
                self._broker.delete(self._old_queue)
                self._old_queue = None

    def _beat(self) -> None:
        """Sends the heartbeat; a newer generation of the child proves that the older ones are dead."""
        beat = self._store.registration.heartbeat(
            self._worker_id,
            beat=self._settings.heartbeat_seconds,
            hindrance=self._hindrance if monotonic() < self._hindered_until else None,
        )
        if self._settled < self._last.generation < beat.generation:
            self._tell_death()
        self._last = beat
        if self._last.state in GIVEN_UP:
            self.failure = self._last.error
        self._early.reported(self._last)
        self._settle(self._last.generation - 1)

    def _has_died(self) -> bool:
        """True where the last child that has reported is gone, and nobody has seen to it."""
        pid = self._last.child_pid
        return pid is not None and self._last.generation > self._settled and not is_running(pid)

    def _on_death(self) -> None:
        if not self._has_died():
            return  # the next child has reported already
        generation = self._last.generation
        self._tell_death()
        self._settle(generation)
        self._store.registration.child_died(self._worker_id, generation)
        loading = self._last.state is WorkerState.LOADING
        self._failed_loads = self._failed_loads + 1 if loading else 0
        if self._failed_loads >= _MAX_FAILED_LOADS:
            self._give_up(f"{self._options.spec}: the process died {self._failed_loads} times while loading it")

    def _tell_death(self) -> None:
        """Logs the end of the last child, and its jobs."""
        child = self._last
        ended_by = self._pool.ended_by(child.child_pid)
        if self._draining.is_set() and ended_by == end_of(0):
            return  # it was told to end just as it became ready, and Celery has replaced it
        held = self._store.recovery.held_by(self._worker_id, generation=child.generation)
        log.warning(
            "the child died",
            worker=self._worker_id,
            pid=child.child_pid,
            state=child.state.value,
            ended_by=ended_by,
            jobs=list(held),
        )

    def _on_early_death(self) -> None:
        self._beat()
        if reason := self._early.judge(self._last):
            self._give_up(f"{self._options.spec}: {reason}")

    def _give_up(self, reason: str) -> None:
        self.failure = reason
        self._store.registration.enter(self._worker_id, WorkerState.FAILED, error=reason)
        os.kill(os.getpid(), signal.SIGTERM)

    def _settle(self, generation: int, outcome: RunOutcome = RunOutcome.CRASHED) -> None:
        """Takes back what the children up to this generation left. Raises StoreError."""
        if generation <= self._settled:
            return
        taken = self._leftovers.settle(self._worker_id, generation, outcome=outcome)
        self._settled = generation
        if taken:
            self._waker.wake()
            if outcome is RunOutcome.CRASHED and self._store.health.is_sick(self._worker_id):
                self._give_up_sick()

    def _give_up_sick(self) -> None:
        self.failure = (
            f"{self._options.spec} on {self._options.placement.written}: three different sets of requests in a row "
            "crashed this worker while other workers answered theirs; look at the device (nvidia-smi, the kernel's "
            "log) and the lines above"
        )
        self._store.health.enter_sick(self._worker_id, reason=self.failure)
        os.kill(os.getpid(), signal.SIGTERM)

    def _end_when_idle(self) -> None:
        seconds = self._options.exit_when_idle_seconds
        if seconds is None or self._draining.is_set():
            return
        busy = self._last.state is not WorkerState.READY or self._last.leases
        if busy or monotonic() - self._idle_since >= seconds:
            self._beat()
            pending = self._store.recovery.pending_of(self._options.spec, most=1, worker_id=self._worker_id)
            if self._last.state is not WorkerState.READY or self._last.leases or pending:
                self._idle_since = monotonic()
            elif monotonic() - self._idle_since >= seconds:
                log.info("idle, so this worker ends", worker=self._worker_id, seconds=seconds)
                os.kill(os.getpid(), signal.SIGTERM)
