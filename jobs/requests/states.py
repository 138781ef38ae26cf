"""The states of jobs, batches, requests, workers and runs, and which may follow which."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum


class JobState(StrEnum):
    LOADING = "loading"  #: its file is being read; no command shows it and no worker claims it
    QUEUED = "queued"
    RUNNING = "running"
    COMPLETED = "completed"  #: every request has an output, also when all of them are errors
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


class BatchState(StrEnum):
    PENDING = "pending"
    LEASED = "leased"
    DONE = "done"
    CANCELLED = "cancelled"


class RequestState(StrEnum):
    """A request's state follows from its output: without one it is pending."""

    PENDING = "pending"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class WorkerState(StrEnum):
    STARTING = "starting"
    LOADING = "loading"
    READY = "ready"  #: holds its model, whether or not there is work
    DRAINING = "draining"
    STOPPED = "stopped"
    FAILED = "failed"  #: its model cannot be loaded; the reason is kept with it
    SICK = "sick"  #: its device breaks whatever it is given; the reason is kept with it


class RunOutcome(StrEnum):
    """The end of one attempt of one worker at one batch."""

    DONE = "done"
    RELEASED = "released"  #: handed back by a worker that drains, or that another worker relieved
    CANCELLED = "cancelled"
    CRASHED = "crashed"  #: the worker's process died
    EXPIRED = "expired"  #: the lease was not renewed in time


#: The states from which a job or a batch may enter each state; every UPDATE of a state is held to it.
JOB_BEFORE: Mapping[JobState, frozenset[JobState]] = {
    JobState.QUEUED: frozenset({JobState.LOADING, JobState.COMPLETED, JobState.CANCELLED}),
    JobState.RUNNING: frozenset({JobState.QUEUED}),
    JobState.COMPLETED: frozenset({JobState.RUNNING}),
    JobState.CANCELLING: frozenset({JobState.QUEUED, JobState.RUNNING}),
    JobState.CANCELLED: frozenset({JobState.CANCELLING}),
}
BATCH_BEFORE: Mapping[BatchState, frozenset[BatchState]] = {
    BatchState.PENDING: frozenset({BatchState.LEASED}),
    BatchState.LEASED: frozenset({BatchState.PENDING}),
    BatchState.DONE: frozenset({BatchState.LEASED}),
    BatchState.CANCELLED: frozenset({BatchState.PENDING, BatchState.LEASED}),
}
CLAIMABLE_JOB_STATES = frozenset({JobState.QUEUED, JobState.RUNNING})
#: The states of jobs of which batches may be leased.
HOLDING_JOB_STATES = frozenset({JobState.RUNNING, JobState.CANCELLING})
CLOSED_JOB_STATES = frozenset({JobState.COMPLETED, JobState.CANCELLED})
OPEN_BATCH_STATES = frozenset({BatchState.PENDING, BatchState.LEASED})
