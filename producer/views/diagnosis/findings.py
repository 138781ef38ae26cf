"""Findings about a job: each states a fact that matters to its end, in plain words, and the remedy.

They are made from a snapshot; no store is asked. No prompt and no address with a password gets into their text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from batchmill.jobs.requests.states import RunOutcome
from batchmill.jobs.runtime.counted import counted
from batchmill.jobs.runtime.times import duration, utc
from batchmill.jobs.store.views.blockers import Crashes, Hold
from batchmill.jobs.store.views.jobs import Job
from batchmill.jobs.store.views.usage import RECENT_SECONDS
from batchmill.producer.views.diagnosis.finding import Finding
from batchmill.producer.views.diagnosis.snapshot import Case
from batchmill.producer.views.diagnosis.unclaimed import unclaimed
from batchmill.producer.views.diagnosis.worker_names import log_of, names, shown
from batchmill.producer.views.finish import finish_line


def closed(job: Job, retry: str) -> Finding:
    """The finding about a job that has ended; `retry`: the sentence on what a retry of it would do."""
    counts, finished = job.counts, finish_line(job)
    message = (
        f"{job.state.value} since {utc(job.finished_at or job.queued_at)}, {counts.succeeded:,} succeeded,"
        f" {counts.failed:,} failed, {counts.cancelled:,} cancelled" + (f"; finished: {finished}" if finished else "")
    )
    if counts.succeeded == counts.total:
        return Finding("closed", message, f"`batchmill results {job.id}` writes its outputs")
    return Finding("closed", message, f"`batchmill results {job.id} --only failed` shows what did not succeed; {retry}")


def open_findings(case: Case) -> list[Finding]:
    """The findings about an open job, the most important first."""
    findings: list[Finding] = []
    if case.cancelling:
        findings.append(_cancelling(case))
    elif case.at_work:
        findings.append(_moving(case))
    if case.around.pending.batches and not case.cancelling:
        findings += unclaimed(case)
    elif not case.around.holds and not case.cancelling:
        findings.append(_closing(case))
    findings += [_lost(case, each) for each in case.lost]
    findings.append(_progress(case))
    findings += [_held(case, each) for each in case.at_work]
    findings += _suspects(case)
    findings += _crashes(case)
    return findings


def _moving(case: Case) -> Finding:
    last, settings = case.around.last_answer_at, case.settings
    if last is not None and case.around.now - last <= RECENT_SECONDS:
        ends = "" if case.status.estimate is None else f"; it ends in {case.status.ends_in}"
        return Finding("moving", f"the last answer came {case.ago(last)} ago{ends}", "nothing to do")
    quiet = "no answer yet" if last is None else f"no answer for {case.ago(last)}"
    return Finding(
        "at_work",
        f"it is being worked on by {names([each.worker for each in case.at_work])}, {quiet}",
        f"wait: long answers take time, and a worker that generates no token for {settings.stall_seconds:g} s is"
        " killed and its batches are requeued; `batchmill logs --level error` on its machine then shows where it hung",
    )


def _cancelling(case: Case) -> Finding:
    if case.at_work:
        who = names([each.worker for each in case.at_work])
        return Finding(
            "cancelling",
            f"it is being cancelled and waits for {who} to release {_batches(case.at_work)}",
            f"wait: a worker releases them at its next save, at most {case.settings.save_seconds:g} s after its step",
        )
    if case.lost:
        who = names([each.worker for each in case.lost])
        return Finding("cancelling", f"it is being cancelled, and {who} left {_batches(case.lost)} behind")
    return _closing(case)


def _closing(case: Case) -> Finding:
    """No request of the job is open any more; the next pass of a reconciler closes it."""
    message = "all its requests have ended, and it has not been closed yet"
    if case.around.live_workers:
        return Finding("closing", message, f"wait: it is closed within {case.settings.reconcile_seconds:g} s")
    return Finding("closing", message, f"`batchmill status {case.job.id}` closes it", stuck=True)


def _lost(case: Case, hold: Hold) -> Finding:
    """A hold that nobody renews: of a dead worker, or of one that is frozen."""
    worker, now = hold.worker, case.around.now
    over_since = case.over_since(hold)
    if hold.lease_until < now:
        lease = f"expired at {utc(hold.lease_until)}, {case.ago(hold.lease_until)} ago"
    else:
        lease = f"runs until {utc(hold.lease_until)}, for another {duration(hold.lease_until - now)}"
        if over_since <= now:
            lease += ", which no lease does: the store's clock was set back, so it counts as expired"
    state = "is alive but does not renew it" if worker.alive else "has ended or is unreachable"
    message = (
        f"{shown(worker)} holds {counted(hold.batches, 'batch')} since {utc(hold.since)} ({case.ago(hold.since)}) and"
        f" {state}, last seen {duration(worker.seen_seconds)} ago; the lease {lease}"
    )
    if not case.around.live_workers:
        remedy = f"no live worker can requeue them; start one: {case.start}"
        if case.cancelling:
            free_at = utc(over_since + case.settings.lease_seconds)
            remedy = f"`batchmill status {case.job.id}` requeues them from {free_at} on"
        return Finding("nobody_reconciles", message, remedy, stuck=True)
    code = "lease_expired" if over_since <= now else "dead_holder"
    if now - over_since > case.reaping_seconds:
        remedy = (
            "the live workers should have noticed by now; `batchmill logs --level warning` on their machines"
            " shows whether they can reach the store"
        )
        return Finding(code, message, remedy, stuck=True)
    within = duration(case.reaping_seconds)
    return Finding(code, message, f"wait: a live worker requeues them within {within} of the lease's end")


def _progress(case: Case) -> Finding:
    counts, pending = case.job.counts, case.around.pending
    waits = "" if pending.waits_since is None else f" (the next one for {case.ago(pending.waits_since)})"
    held = sum(each.batches for each in case.around.holds)
    return Finding(
        "progress",
        f"{counts.total - counts.pending:,} of {counts.total:,} requests ended;"
        f" {counted(pending.batches, 'batch')} pending{waits}, {held:,} held",
    )


def _held(case: Case, hold: Hold) -> Finding:
    return Finding(
        "held",
        f"{shown(hold.worker)} holds {counted(hold.batches, 'batch')} since {utc(hold.since)} ({case.ago(hold.since)}),"
        f" lease until {utc(hold.lease_until)}",
    )


def _suspects(case: Case) -> Iterator[Finding]:
    pending = case.around.pending
    if pending.suspects:
        yield Finding(
            "suspects",
            f"{counted(pending.suspect_requests, 'request')} in {counted(pending.suspects, 'batch')} were in a worker"
            " when its process died; such a batch runs alone on a worker",
            "nothing to do: a request that keeps killing its worker ends with the error `poison`",
        )


def _crashes(case: Case) -> Iterator[Finding]:
    for each in case.around.crashes:
        died = "died" if each.outcome is RunOutcome.CRASHED else "let its lease expire"
        yield Finding(
            "crashed",
            f"a process of {each.worker.name} on {each.worker.host} {died} on this job, {counted(each.times, 'time')},"
            f" the last at {utc(each.last_at)}",
            _where_it_says(case, each),
        )


def _where_it_says(case: Case, crashes: Crashes) -> str:
    """The log that says how the last of these crashes came about: a process that is killed cannot log it itself."""
    log = log_of(crashes.worker)
    if crashes.outcome is not RunOutcome.CRASHED:
        return f"{log} has its log of that time"
    if case.outlived(crashes):
        return f"{log} shows why"
    return (
        f"the worker itself ended: {log} has its last lines, and `batchmill logs supervisor` there shows how it ended,"
        " if `up`, `run` or `--devices` started it and outlived it"
    )


def _batches(holds: Sequence[Hold]) -> str:
    return counted(sum(each.batches for each in holds), "batch")
