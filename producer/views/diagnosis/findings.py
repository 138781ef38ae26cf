"""Findings about a job: each states a fact that matters to its end, in plain words, and the remedy.

They are made from a snapshot; no store is asked. No prompt and no address with a password gets into their text.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from batchmill.jobs.advice import mill_lives
from batchmill.jobs.broker.client import MAX_WAKEUPS
from batchmill.jobs.models.misspellings import slip_line
from batchmill.jobs.models.spec import ECHO
from batchmill.jobs.requests.states import RunOutcome, WorkerState
from batchmill.jobs.runtime.counted import counted
from batchmill.jobs.runtime.one_line import one_line
from batchmill.jobs.runtime.times import duration, utc
from batchmill.jobs.store.views.blockers import Crashes, Hold, SeenWorker
from batchmill.jobs.store.views.jobs import Job
from batchmill.jobs.store.views.missing_adapters import MissingAdapter
from batchmill.jobs.store.views.usage import RECENT_SECONDS
from batchmill.jobs.store.workers import GIVEN_UP, WorkerRow
from batchmill.producer.views.diagnosis.snapshot import Case
from batchmill.producer.views.finish import finish_line
from batchmill.producer.views.reasons import (
    IF_NOT_OF_UP,
    MILL_STARTS,
    advice,
    given_up_line,
    is_starting,
    lack_line,
    other_line,
    other_remedy,
    restarting_line,
    silent_line,
    slip_remedy,
)

_MOST_NAMES = 3
#: Every pass of a reconciler sends a wake-up for a pending batch beside an idle worker. After this many passes, the
#: batch counts as stuck.
_PASSES = 4
_LONG_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One fact about a job, and what to do about it."""

    code: str
    message: str
    remedy: str = ""
    stuck: bool = False  #: it keeps the job from moving until the user does something


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
    found: list[Finding] = []
    if case.cancelling:
        found.append(_cancelling(case))
    elif case.at_work:
        found.append(_moving(case))
    if case.around.pending.batches and not case.cancelling:
        found += _claimable(case)
    elif not case.around.holds and not case.cancelling:
        found.append(_closing(case))
    found += [_lost(case, each) for each in case.lost]
    found.append(_progress(case))
    found += [_held(case, each) for each in case.at_work]
    found += _suspects(case)
    found += _crashes(case)
    return found


def _moving(case: Case) -> Finding:
    last, settings = case.around.last_answer_at, case.settings
    if last is not None and case.around.now - last <= RECENT_SECONDS:
        ends = "" if case.status.estimate is None else f"; it ends in {case.status.ends_in}"
        return Finding("moving", f"the last answer came {case.ago(last)} ago{ends}", "nothing to do")
    quiet = "no answer yet" if last is None else f"no answer for {case.ago(last)}"
    return Finding(
        "at_work",
        f"it is being worked on by {_names([each.worker for each in case.at_work])}, {quiet}",
        f"wait: long answers take time, and a worker that generates no token for {settings.stall_seconds:g} s is"
        " killed and its batches are requeued; `batchmill logs --level error` on its machine then shows where it hung",
    )


def _cancelling(case: Case) -> Finding:
    if case.at_work:
        who = _names([each.worker for each in case.at_work])
        return Finding(
            "cancelling",
            f"it is being cancelled and waits for {who} to release {_batches(case.at_work)}",
            f"wait: a worker releases them at its next save, at most {case.settings.save_seconds:g} s after its step",
        )
    if case.lost:
        who = _names([each.worker for each in case.lost])
        return Finding("cancelling", f"it is being cancelled, and {who} left {_batches(case.lost)} behind")
    return _closing(case)


def _closing(case: Case) -> Finding:
    """No request of the job is open any more; the next pass of a reconciler closes it."""
    message = "all its requests have ended, and it has not been closed yet"
    if case.around.live_workers:
        return Finding("closing", message, f"wait: it is closed within {case.settings.reconcile_seconds:g} s")
    return Finding("closing", message, f"`batchmill status {case.job.id}` closes it", stuck=True)


def _claimable(case: Case) -> Iterator[Finding]:
    """The reasons why the pending batches are not claimed."""
    takers = case.able
    if case.takers:
        yield from (_lacking(case, each) for each in case.status.lacks)
    ready = [each for each in takers if each.state is WorkerState.READY]
    loading = [each for each in takers if each.state in (WorkerState.STARTING, WorkerState.LOADING)]
    if ready:
        yield from _ready(case, ready)
    elif loading:
        yield _loading(case, loading)
    elif takers:
        yield Finding(
            "draining",
            f"the remaining workers are stopping and take no new work: {_names(takers)}",
            f"start another: {case.start}",
            stuck=True,
        )
    elif not case.takers:
        yield from _nobody(case)
    if takers:
        yield from (_given_up(case, each) for each in case.gone if each.state in GIVEN_UP)


def _lacking(case: Case, lack: MissingAdapter) -> Finding:
    """An adapter that is held by none of the workers that could take the job otherwise."""
    return Finding(
        "adapter_missing",
        lack_line(lack),
        other_remedy(case.job) if lack.changed else f"start a worker that holds it: {case.start}",
        stuck=not case.takeable_batches,
    )


def _ready(case: Case, ready: Sequence[SeenWorker]) -> Iterator[Finding]:
    idle = [each for each in ready if not each.batches]
    if case.queue.error is not None:
        yield _redis_away(case, idle)
    for job_id, batches in case.around.older:
        yield Finding(
            "older_job_first",
            f"job {job_id} of the same model is older, and its {counted(batches, 'pending batch')} go first",
            f"wait, start another worker, or `batchmill cancel {job_id}`",
        )
    if idle and case.queue.error is None:
        yield _not_claimed(case, idle)
    elif not idle and not case.at_work:
        yield Finding(
            "workers_busy",
            f"the workers that could take it are busy with other batches: {_names(ready)}",
            f"wait, or start another: {case.start}",
        )


def _redis_away(case: Case, idle: Sequence[SeenWorker]) -> Finding:
    embedded = case.settings.embedded_broker
    remedy = "start Redis, or correct BATCHMILL_BROKER_URL"
    if embedded:
        lives = mill_lives(case.settings.home)
        remedy = "wait: the mill that is up starts it again" if lives else f"start the mill again: {case.start}"
    every = duration(case.settings.reconcile_seconds)
    if idle:
        message = f"Redis cannot be reached; {_names(idle)} checks the store for work every {every}"
    else:
        message = f"Redis cannot be reached; busy workers go on, and idle ones check the store for work every {every}"
    return Finding("redis_away", f"{message} ({one_line(case.queue.error or '')})", remedy)


def _not_claimed(case: Case, idle: Sequence[SeenWorker]) -> Finding:
    pending, wakeups = case.around.pending, case.queue.wakeups
    message = (
        f"{counted(case.takeable_batches, 'batch')} pending beside idle {_names(idle)},"
        f" with {counted(wakeups, 'wake-up')} in the queue"
    )
    since = max([pending.waits_since or case.around.now, *(each.started_at for each in idle)])
    if case.around.now - since > max(_LONG_SECONDS, _PASSES * case.settings.reconcile_seconds):
        return Finding(
            "not_claimed",
            f"{message}, for {case.ago(since)}",
            f"that is too long: see {_log(idle[0])}, and restart the worker",
            stuck=True,
        )
    if wakeups < min(case.takeable_batches, MAX_WAKEUPS):
        within = f"{case.settings.reconcile_seconds:g} s"
        return Finding("not_claimed", message, f"wait: workers send the missing wake-ups within {within}")
    return Finding("not_claimed", message, "wait: an idle worker takes a wake-up within seconds")


def _loading(case: Case, loading: Sequence[SeenWorker]) -> Finding:
    first = min(loading, key=_began_to_load)
    since = _began_to_load(first)
    which = "the first " if len(loading) > 1 else ""
    again = f"for the {_ordinal(first.generation)} time, " if first.generation > 1 else ""
    if case.job.spec.model == ECHO:  # of which nothing is loaded
        what = f"{_names(loading)} {'are' if len(loading) > 1 else 'is'} starting"
    else:
        what = f"the model is being loaded by {_names(loading)}"
    limit = f"a load that takes longer than {duration(case.settings.load_stall_seconds)} is given up"
    return Finding(
        "loading_model",
        f"{what}, {which}{again}since {utc(since)} ({case.ago(since)} ago)",
        f"wait: {limit}; `batchmill workers` shows its progress",
    )


def _began_to_load(worker: SeenWorker) -> float:
    """The time at which a worker's newest child began to load, or the worker itself where it has no child yet."""
    return worker.started_at if worker.loading_since is None else worker.loading_since


def _nobody(case: Case) -> Iterator[Finding]:
    """No live worker may take this job: the reason first, then the workers that come near."""
    gone = case.gone
    if case.others:
        first = case.others[0]
        message = other_line(case.job, first.name, first.host, first.identity)
        yield Finding("another_model", message, other_remedy(case.job), stuck=True)
    elif case.status.silent is not None:
        silent = case.status.silent
        yield Finding("worker_silent", silent_line(silent), f"wait; {_log(silent)} says what hinders it")
    elif gone and gone[0].state in GIVEN_UP and not is_starting(case.status):
        yield _given_up(case, gone[0], all_of_them=True)
        gone = gone[1:]
    elif case.status.restarting is not None:
        message = restarting_line(case.status.restarting)
        yield Finding("worker_restarts", message, f"wait; {IF_NOT_OF_UP}: {case.start}")
    elif case.status.meant is not None:
        message = slip_line(case.job.spec, case.status.meant)
        yield Finding("likely_slip", message, f"{slip_remedy(case.status)}: {case.start}", stuck=True)
    elif is_starting(case.status):
        yield Finding("worker_starts", f"no live worker serves {case.job.spec} yet: {MILL_STARTS}", "wait")
    else:
        since = case.status.missing_seconds
        yield Finding(
            "no_worker",
            f"no live worker serves {case.job.spec}" + ("" if since is None else f", for {duration(since)}"),
            f"start one: {case.start}",
            stuck=True,
        )
    held_by = {each.worker.id for each in case.lost}
    yield from (_gone(case, each) for each in gone[:_MOST_NAMES] if each.id not in held_by)
    bound = [each for each in case.around.serving if each.alive and each not in case.others]
    for each in bound[:_MOST_NAMES]:
        yield Finding("bound_worker", f"{_who(each)} serves job {each.only_job} alone")
    yield from (_near_miss(case, each) for each in case.around.others[:_MOST_NAMES])


def _near_miss(case: Case, worker: SeenWorker) -> Finding:
    flags = shlex.join(worker.spec.command_line()[2:])
    return Finding(
        "near_miss",
        f"{_who(worker)} holds {worker.spec}, and this job needs {case.job.spec}",
        f"if you meant that one: `batchmill cancel {case.job.id}`, and submit again with {flags}",
    )


def _gone(case: Case, worker: SeenWorker) -> Finding:
    if worker.state in GIVEN_UP:
        return _given_up(case, worker)
    ended = "stopped" if worker.state is WorkerState.STOPPED else f"was {worker.state.value} and is dead or unreachable"
    return Finding("worker_gone", f"{_who(worker)} {ended}, last seen {duration(worker.seen_seconds)} ago")


def _given_up(case: Case, worker: SeenWorker, *, all_of_them: bool = False) -> Finding:
    """A worker that is sick, or whose model cannot be loaded."""
    code = "sick" if worker.state is WorkerState.SICK else "load_failed"
    before = f"no worker of {case.job.spec} is left: " if all_of_them else ""
    remedy = f"{advice(worker.state)}{case.start}"
    message = f"{before}{given_up_line(worker)}"
    return Finding(f"all_{code}" if all_of_them else f"worker_{code}", message, remedy, stuck=all_of_them)


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
        f"{_who(worker)} holds {counted(hold.batches, 'batch')} since {utc(hold.since)} ({case.ago(hold.since)}) and"
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
        f"{_who(hold.worker)} holds {counted(hold.batches, 'batch')} since {utc(hold.since)} ({case.ago(hold.since)}),"
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
    log = _log(crashes.worker)
    if crashes.outcome is not RunOutcome.CRASHED:
        return f"{log} has its log of that time"
    if case.outlived(crashes):
        return f"{log} shows why"
    return (
        f"the worker itself ended: {log} has its last lines, and `batchmill logs supervisor` there shows how it ended,"
        " if `up`, `run` or `--devices` started it and outlived it"
    )


def _log(worker: SeenWorker | WorkerRow) -> str:
    return f"`{shlex.join(['batchmill', 'logs', worker.name])}` on {worker.host}"


def _who(worker: SeenWorker) -> str:
    return f"worker {worker.name} on {worker.host} ({worker.device})"


def _names(workers: Sequence[SeenWorker]) -> str:
    """`worker a on host`, or `workers a on host, b on host and 4 more`."""
    shown = ", ".join(f"{each.name} on {each.host}" for each in workers[:_MOST_NAMES])
    more = f" and {len(workers) - _MOST_NAMES} more" if len(workers) > _MOST_NAMES else ""
    return f"worker{'s' if len(workers) > 1 else ''} {shown}{more}"


def _batches(holds: Sequence[Hold]) -> str:
    return counted(sum(each.batches for each in holds), "batch")


def _ordinal(number: int) -> str:
    """`1st`, `2nd`, `13th`."""
    ends = {1: "st", 2: "nd", 3: "rd"}
    return f"{number}{'th' if number % 100 in (11, 12, 13) else ends.get(number % 10, 'th')}"
