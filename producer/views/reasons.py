"""Sentences about the workers that a job lacks, the reasons, and the remedies: the same in every command."""

from __future__ import annotations

import shlex

from batchmill.jobs.models.identity import differences
from batchmill.jobs.models.misspellings import slip_line
from batchmill.jobs.requests.states import WorkerState
from batchmill.jobs.runtime.counted import counted
from batchmill.jobs.runtime.one_line import one_line
from batchmill.jobs.runtime.times import duration
from batchmill.jobs.store.views.jobs import Job
from batchmill.jobs.store.views.missing_adapters import MissingAdapter
from batchmill.jobs.store.views.seen_workers import SeenWorker
from batchmill.jobs.store.views.workers import WorkerRow
from batchmill.producer.views.status import JobStatus

IF_NOT_OF_UP = "if neither `up` nor `run` started it, start it yourself"
MILL_STARTS = "the mill here is starting its worker"
_MOST_REASONS = 3


def missing_lines(status: JobStatus) -> list[str]:
    """Lines on the worker or adapter that a job lacks, for how long, why if known, and the command that helps."""
    start = status.start
    if status.others:
        first = status.others[0]
        return [f"{other_line(status.job, first.name, first.host, first.identity)};", other_remedy(status.job)]
    if status.missing_seconds is None:
        return _lacking_lines(status) if status.lacks else []
    if status.silent is not None:
        return [silent_line(status.silent)]
    if status.restarting is not None:
        return [f"{restarting_line(status.restarting)};", f"{IF_NOT_OF_UP}: {start}"]
    missing = f"no live worker has served {status.job.spec} for {duration(status.missing_seconds)}"
    if status.is_never_served:
        missing = f"no worker serves {status.job.spec} yet"
    if status.meant is not None:
        return [f"{missing}: {slip_line(status.job.spec, status.meant)}", f"{slip_remedy(status)}:", start]
    if is_starting(status):
        return [f"{missing}: {MILL_STARTS}"]
    if not status.given_up:
        return [f"{missing}; start one:", start]
    reasons = [f"{given_up_line(each)};" for each in status.given_up[:_MOST_REASONS]]
    return [f"{missing}:", *reasons, f"{advice(status.given_up[0].state)}{start}"]


def slip_remedy(status: JobStatus) -> str:
    """The remedy for a model's name that is likely a slip, up to the command that starts a worker for it."""
    again = f"`batchmill cancel {status.job.id}`, and submit it again with -m {shlex.quote(status.meant or '')}"
    return f"{again}; if {status.job.spec.model} is what you mean, start a worker"


def _lacking_lines(status: JobStatus) -> list[str]:
    changed = any(each.changed for each in status.lacks)
    return [
        *map(lack_line, status.lacks),
        other_remedy(status.job) if changed else f"start a worker that holds it: {status.start}",
    ]


def restarting_line(worker: WorkerRow) -> str:
    """The sentence about a worker whose process has just ended, and which its mill starts again."""
    return f"worker {worker.name} has ended, and the mill here restarts it within a minute"


def silent_line(worker: WorkerRow) -> str:
    """The sentence about a worker that is silent, though its process lives."""
    return f"worker {worker.name} has not been heard of for {duration(worker.seen_seconds)}, and its process lives"


def is_starting(status: JobStatus) -> bool:
    """True where the mill here is yet to start its worker, unless it waits longer because that worker is sick."""
    return status.is_starting and all(each.state is not WorkerState.SICK for each in status.given_up)


def lack_line(lack: MissingAdapter) -> str:
    """The sentence about an adapter that nobody holds, and a worker that holds another one under its name."""
    waiting = f"{counted(lack.batches, 'batch')} {'waits' if lack.batches == 1 else 'wait'}"
    line = f"{waiting} for the adapter {lack.name}, which no live worker holds"
    if lack.meant is None or not lack.held_otherwise:
        return line
    who, other = lack.held_otherwise[0]
    if lack.changed:
        return f"{line}: {lack.meant.where} has changed since this job used it, and worker {who} holds the new version"
    return f"{line}: this job means {lack.meant.where}, and worker {who} holds {other.where} under that name"


def other_line(job: Job, worker: str, host: str, identity: str | None) -> str:
    """The sentence about a worker of a job's ModelSpec that holds another model than the job was begun with."""
    changed = differences(job.identity or "", identity or "")
    return f"it was started with another model than worker {worker} on {host} holds; changed since then: {changed}"


def other_remedy(job: Job) -> str:
    """The remedy for a job that was begun with another model than its workers hold."""
    return (
        "to finish it, restore the old model and restart a worker; to have the new one answer everything, "
        f"`batchmill cancel {job.id}` and submit the file again"
    )


def given_up_line(worker: SeenWorker) -> str:
    """The sentence about a worker that gave up, and its reason."""
    what = "is sick" if worker.state is WorkerState.SICK else "could not load the model"
    why = one_line(worker.error or "no reason is known")
    return f"worker {worker.name} on {worker.host} ({worker.device}) {what}: {why}"


def advice(state: WorkerState) -> str:
    """The remedy for a worker that gave up, up to the command that starts it again."""
    if state is WorkerState.SICK:
        return "check its device (the driver's log, the worker's log), then start it again: "
    return "fix that, then start it again: "
