"""The verdict on one job: whether it moves, the finding that is the reason, and what else is to be known.

It asks the store and Redis (`snapshot`); `findings` judges what they say.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from batchmill.jobs.broker.client import Broker
from batchmill.jobs.broker.queue_name import queue_name
from batchmill.jobs.configuration.settings import Settings
from batchmill.jobs.errors import BrokerUnavailable
from batchmill.jobs.store.store import Store
from batchmill.jobs.store.views.jobs import Job
from batchmill.migrations.revisions import open_store
from batchmill.producer.views.diagnosis.finding import Finding
from batchmill.producer.views.diagnosis.findings import closed, open_findings
from batchmill.producer.views.diagnosis.snapshot import Case, QueueState
from batchmill.producer.views.gone_workers import around_here
from batchmill.producer.views.retries import retry_advice
from batchmill.producer.views.status import JobStatus


class Verdict(StrEnum):
    """The progress of a job, in one word."""

    CLOSED = "closed"
    MOVING = "moving"  #: a live worker holds some of it
    WAITING = "waiting"  #: nobody works on it now, and it goes on by itself
    STUCK = "stuck"  #: it does not go on until the user does something


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The verdict on one job; its first finding is the reason."""

    job: Job
    verdict: Verdict
    findings: tuple[Finding, ...]

    @property
    def exit_code(self) -> int:
        """1 where the user has to act, else 0."""
        return int(self.verdict is Verdict.STUCK)

    def to_json(self) -> dict[str, Any]:
        return {
            "job": self.job.id,
            "state": self.job.state.value,
            "verdict": self.verdict.value,
            "findings": [{"code": each.code, "message": each.message, "remedy": each.remedy} for each in self.findings],
        }

    def lines(self) -> list[str]:
        """For people: the verdict and what to do, then a fact a line."""
        reason, *rest = self.findings
        title = f"job {self.job.id}" + (f" ({self.job.name})" if self.job.name else "")
        lines = [f"{title} is {self.verdict.value}: {reason.message}"]
        lines += [f"  -> {reason.remedy}"] if reason.remedy else []
        return lines + [f"  {each.message}" + (f" -> {each.remedy}" if each.remedy else "") for each in rest]


def examine_job(settings: Settings, written: str) -> Diagnosis:
    """The diagnosis of the job that a user wrote: an id, a unique beginning of one, or `last`.

    Raises NotFound, also for a job whose file is still being loaded, and StoreError.
    """
    store = open_store(settings)
    try:
        job = store.jobs.job(store.jobs.find(written))
        # Redis first: where it is away that takes seconds, and the store's answer should be the newest.
        queue = QueueState() if job.closed else queue_state(settings, queue_name(job.spec, store.id))
        return diagnose(JobStatus.read(store, job.id, settings), store, queue, settings)
    finally:
        store.close()


def diagnose(status: JobStatus, store: Store, queue: QueueState, settings: Settings) -> Diagnosis:
    """Judges what the store and Redis say of a job. A job that a live worker holds is moving, whatever else is so."""
    if status.job.closed:
        return Diagnosis(status.job, Verdict.CLOSED, (closed(status.job, retry_advice(status.job, store)),))
    around = around_here(store.blockers.around(status.job.id, lease_seconds=settings.lease_seconds))
    case = Case(status, around, queue, settings)
    findings = open_findings(case)
    if case.moves:
        return Diagnosis(status.job, Verdict.MOVING, tuple(findings))
    stuck = [each for each in findings if each.stuck]
    if not stuck:
        return Diagnosis(status.job, Verdict.WAITING, tuple(findings))
    rest = [each for each in findings if each is not stuck[0]]
    return Diagnosis(status.job, Verdict.STUCK, (stuck[0], *rest))


def queue_state(settings: Settings, queue: str) -> QueueState:
    """Asks Redis for a queue: the number of its wake-ups, or the reason why Redis is away."""
    broker = Broker.of(settings)
    try:
        wakeups = broker.length(queue)
        broker.check_writes(queue)
        return QueueState(wakeups=wakeups)
    except BrokerUnavailable as error:
        return QueueState(error=str(error))
    finally:
        broker.close()
