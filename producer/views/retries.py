"""Retries as a user sees them: requests that may succeed now, those that are skipped and why, and the next command."""

from __future__ import annotations

from collections.abc import Iterator
from math import inf

from batchmill.jobs.errors import JobStateError
from batchmill.jobs.requests.causes import Cause, Chances, cause_of
from batchmill.jobs.requests.states import JobState, WorkerState
from batchmill.jobs.runtime.counted import counted
from batchmill.jobs.store.jobs.retry import LeftAlone, Retried
from batchmill.jobs.store.store import Store
from batchmill.jobs.store.views.jobs import Job
from batchmill.producer.views.gone_workers import seen_here
from batchmill.producer.views.reasons import missing_lines
from batchmill.producer.views.status import JobStatus


def chances_of(job: Job, *, everything: bool, store: Store) -> Chances:
    """Chances of another try of a job that has ended, by the workers that live now.

    Raises JobStateError for an open one that does not end by itself, unless a retry of it was cut short.
    """
    if not job.closed:
        _require_served(job, store)
    keeps_model = job.counts.succeeded > 0
    rows = [seen_here(each) for each in store.workers.rows(spec=job.spec)]
    contexts = [
        inf if each.context_tokens is None else each.context_tokens
        for each in rows
        if each.alive
        and each.state is WorkerState.READY
        and each.only_job in (None, job.id)
        and (job.is_of(each.identity) or not keeps_model)
    ]
    return Chances(max(contexts, default=0), keeps_model=keeps_model, everything=everything)


def retry_lines(status: JobStatus, retried: Retried, chances: Chances) -> Iterator[str]:
    """Lines on a retry: what it moved, what it skipped, and the command that runs what it moved."""
    job = status.job
    yield f"job {job.id}: {_moved(job, retried)}"
    for code, left in sorted(retried.left.items()):
        yield f"skipped: {left.count:,} {code} ({_names(left)}): {_reason(code, left, chances)}"
    if retried.left:
        yield _all_of_it(job)
    if not retried.is_whole:
        yield (
            "another retry or a cancel of this job interfered, so some requests may be left: once it has ended, "
            f"`batchmill retry {job.id}` runs them"
        )
    if retried.moved and not job.closed:
        yield from missing_lines(status) or [f"workers will pick them up; `batchmill wait {job.id}` follows"]


def _moved(job: Job, retried: Retried) -> str:
    if retried.moved:
        return f"{counted(retried.moved, 'request')} {'is' if retried.moved == 1 else 'are'} pending again"
    total = job.counts.total
    if job.counts.succeeded < total:
        return "nothing to run again"
    return f"nothing to run again: {'its' if total == 1 else 'all'} {counted(total, 'request')} succeeded"


def retry_advice(job: Job, store: Store) -> str:
    """Advice on a job that has ended: the command that retries it, or why a retry moves nothing and what helps."""
    chances = chances_of(job, everything=False, store=store)
    ended = store.retries.unsuccessful(job.id)
    if any(chances.are_there(code, prompt_tokens=each.shortest_tokens) for code, each in ended.items()):
        return f"`batchmill retry {job.id}` runs those that may succeed now"
    reasons = [f"{each.count:,} {code}: {_reason(code, each, chances)}" for code, each in ended.items()]
    return f"a retry would skip them ({'; '.join(reasons)}); {_all_of_it(job)}"


def _require_served(job: Job, store: Store) -> None:
    """Raises JobStateError, with what makes the job go on, where nobody works on it."""
    if job.state is JobState.CANCELLING or store.retries.is_cut_short(job.id):
        return
    missing = missing_lines(JobStatus.read(store, job.id))
    if missing:
        other = f", or at once after `batchmill cancel {job.id}`" if job.counts.failed else ""
        when = f"retry it once it has ended{other}"
        raise JobStateError(f"job {job.id} is {job.state.value}: {when}; {' '.join(missing)}")


def _all_of_it(job: Job) -> str:
    return f"`batchmill retry {job.id} --all` runs these too; submit corrected lines as a new file"


def _reason(code: str, left: LeftAlone, chances: Chances) -> str:
    if cause_of(code) is not Cause.LENGTH:
        return cause_of(code).value
    shortest = f"the shortest of these prompts has {left.shortest_tokens:,} tokens, and "
    if not chances.context_tokens:
        return f"{shortest}no live worker holds the model"
    limit = f"{chances.context_tokens:,.0f} with the answer"
    return f"{shortest}no live worker takes more than {limit}; a larger --context helps if the model supports it"


def _names(left: LeftAlone) -> str:
    """The first of these requests, counted from 0 as in `results`."""
    more = f" and {left.count - len(left.indexes):,} more" if left.count > len(left.indexes) else ""
    return f"index {', '.join(map(str, left.indexes))}{more}"
