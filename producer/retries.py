"""Retries as a user sees them: what another try can answer, what is left alone and why, and who runs the rest."""

from __future__ import annotations

from collections.abc import Iterator
from math import inf

from jobs.causes import Cause, Chances, cause_of
from jobs.states import WorkerState
from jobs.store import Store
from jobs.store.reading import Job
from jobs.store.retrying import Left, Retried
from producer.here import seen_here
from producer.status import JobStatus


def chances_of(job: Job, *, everything: bool, store: Store) -> Chances:
    """What of a job that has ended another try can end otherwise, by the workers that live now."""
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
    """What a retry did, what it left alone, and the command that runs what it moved."""
    job = status.job
    moved = "1 request is" if retried.moved == 1 else f"{retried.moved:,} requests are"
    yield f"job {job.id}: {moved} pending again"
    for code, left in sorted(retried.left.items()):
        yield f"left alone: {left.count:,} {code} ({_names(left)}): {_reason(code, left, chances)}"
    if retried.left:
        yield f"`batchmill retry {job.id} --all` runs these too; corrected lines are submitted as a file of their own"
    if not retried.is_whole:
        yield (
            "a cancel or another retry of this job came in between, so that some may be left: once it has ended, "
            f"`batchmill retry {job.id}` runs them"
        )
    if retried.moved and not job.closed:
        yield from status.missing_lines() or [f"its workers take it up; `batchmill wait {job.id}` follows"]


def _reason(code: str, left: Left, chances: Chances) -> str:
    if cause_of(code) is not Cause.LENGTH:
        return cause_of(code).value
    shortest = f"the shortest of these prompts has {left.shortest_tokens:,} tokens, and "
    if not chances.context_tokens:
        return f"{shortest}no worker lives that holds the model"
    most = f"{chances.context_tokens:,.0f} with the answer"
    return f"{shortest}no live worker takes more than {most}; a larger --context helps where its model has one"


def _names(left: Left) -> str:
    """The first of them, counted from 0 as `results` does."""
    more = f" and {left.count - len(left.indexes):,} more" if left.count > len(left.indexes) else ""
    return f"index {', '.join(map(str, left.indexes))}{more}"
