"""A snapshot of one open job: what the store and Redis say of it, and which workers matter to it."""

from __future__ import annotations

from dataclasses import dataclass

from batchmill.jobs.configuration.settings import Settings
from batchmill.jobs.requests.states import JobState, WorkerState
from batchmill.jobs.runtime.times import duration
from batchmill.jobs.store.tables import NO_ADAPTER
from batchmill.jobs.store.views.blockers import Crashes, Hold, Surroundings
from batchmill.jobs.store.views.jobs import Job
from batchmill.jobs.store.views.seen_workers import SeenWorker
from batchmill.jobs.store.workers.liveness import GIVEN_UP
from batchmill.producer.views.status import JobStatus


@dataclass(frozen=True, slots=True)
class QueueState:
    """The state of a job's queue in Redis."""

    error: str | None = None  #: the reason why Redis is away
    wakeups: int = 0  #: the number of wake-ups in the queue


@dataclass(frozen=True, slots=True)
class Case:
    """All that is known of one open job."""

    status: JobStatus
    around: Surroundings
    queue: QueueState
    settings: Settings

    @property
    def job(self) -> Job:
        return self.status.job

    @property
    def cancelling(self) -> bool:
        return self.job.state is JobState.CANCELLING

    @property
    def at_work(self) -> list[Hold]:
        """Holds of live workers that renew their leases."""
        return [each for each in self.around.holds if each.worker.alive and not each.expired]

    @property
    def lost(self) -> list[Hold]:
        return [each for each in self.around.holds if not each.worker.alive or each.expired]

    @property
    def moves(self) -> bool:
        return bool(self.at_work) and not self.cancelling

    @property
    def takers(self) -> list[SeenWorker]:
        """Live workers that may take this job."""
        return [each for each in self._unbound if self.job.is_of(each.identity)]

    @property
    def others(self) -> list[SeenWorker]:
        """Live workers that could take it, but hold another model than it was begun with."""
        return [each for each in self._unbound if not self.job.is_of(each.identity)]

    @property
    def _unbound(self) -> list[SeenWorker]:
        return [each for each in self.around.serving if each.alive and each.only_job in (None, self.job.id)]

    @property
    def able(self) -> list[SeenWorker]:
        """Those of the takers that hold the adapter that some pending batch needs, if any."""
        needs, meant = self.around.pending.needs, {each.name: each for each in self.job.adapters}
        if NO_ADAPTER in needs:
            return self.takers
        return [
            taker
            for taker in self.takers
            if any(each.name in needs and meant.get(each.name, each).agrees_with(each) for each in taker.adapters)
        ]

    @property
    def takeable_batches(self) -> int:
        """The number of pending batches that lack no adapter."""
        return max(0, self.around.pending.batches - sum(each.batches for each in self.status.lacks))

    @property
    def gone(self) -> list[SeenWorker]:
        return [each for each in self.around.serving if not each.alive]

    @property
    def reaping_seconds(self) -> float:
        """The longest time from a lease's end until it is taken back: it is seen expired twice, half a lease apart."""
        return self.settings.lease_seconds / 2 + 2 * self.settings.reconcile_seconds

    def outlived(self, crashes: Crashes) -> bool:
        """True where the worker was heard of after the last of these crashes, so that its log goes on."""
        worker = crashes.worker
        ended_itself = worker.state in (WorkerState.STOPPED, *GIVEN_UP)
        return worker.alive or ended_itself or self.around.now - worker.seen_seconds >= crashes.last_at

    def over_since(self, hold: Hold) -> float:
        """The time at which a hold's first lease ends; now, if that is further ahead than any lease's end can be."""
        is_ahead = hold.lease_until > self.around.now + self.settings.lease_seconds
        return self.around.now if is_ahead else hold.lease_until

    @property
    def start(self) -> str:
        """The command that starts a worker for this job."""
        return self.status.start

    def ago(self, at: float) -> str:
        return duration(max(0.0, self.around.now - at))
