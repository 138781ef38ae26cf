"""Findings about pending batches that no worker claims: who could, what keeps them from it, and who comes near."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence

from batchmill.jobs.advice import mill_lives
from batchmill.jobs.broker.client import MAX_WAKEUPS
from batchmill.jobs.models.misspellings import slip_line
from batchmill.jobs.models.spec import ECHO
from batchmill.jobs.requests.states import WorkerState
from batchmill.jobs.runtime.counted import counted
from batchmill.jobs.runtime.one_line import one_line
from batchmill.jobs.runtime.times import duration, utc
from batchmill.jobs.store.views.missing_adapters import MissingAdapter
from batchmill.jobs.store.views.seen_workers import SeenWorker
from batchmill.jobs.store.workers.liveness import GIVEN_UP
from batchmill.producer.views.diagnosis.finding import Finding
from batchmill.producer.views.diagnosis.snapshot import Case
from batchmill.producer.views.diagnosis.worker_names import MOST_NAMES, log_of, names, shown
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

#: Every pass of a reconciler sends a wake-up for a pending batch beside an idle worker. After this many passes, the
#: batch counts as stuck.
_PASSES = 4
_LONG_SECONDS = 60.0


def unclaimed(case: Case) -> Iterator[Finding]:
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
            f"the remaining workers are stopping and take no new work: {names(takers)}",
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
            f"the workers that could take it are busy with other batches: {names(ready)}",
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
        message = f"Redis cannot be reached; {names(idle)} checks the store for work every {every}"
    else:
        message = f"Redis cannot be reached; busy workers go on, and idle ones check the store for work every {every}"
    return Finding("redis_away", f"{message} ({one_line(case.queue.error or '')})", remedy)


def _not_claimed(case: Case, idle: Sequence[SeenWorker]) -> Finding:
    pending, wakeups = case.around.pending, case.queue.wakeups
    message = (
        f"{counted(case.takeable_batches, 'batch')} pending beside idle {names(idle)},"
        f" with {counted(wakeups, 'wake-up')} in the queue"
    )
    since = max([pending.waits_since or case.around.now, *(each.started_at for each in idle)])
    if case.around.now - since > max(_LONG_SECONDS, _PASSES * case.settings.reconcile_seconds):
        return Finding(
            "not_claimed",
            f"{message}, for {case.ago(since)}",
            f"that is too long: see {log_of(idle[0])}, and restart the worker",
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
        what = f"{names(loading)} {'are' if len(loading) > 1 else 'is'} starting"
    else:
        what = f"the model is being loaded by {names(loading)}"
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
        yield Finding("worker_silent", silent_line(silent), f"wait; {log_of(silent)} says what hinders it")
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
    yield from (_gone(case, each) for each in gone[:MOST_NAMES] if each.id not in held_by)
    bound = [each for each in case.around.serving if each.alive and each not in case.others]
    for each in bound[:MOST_NAMES]:
        yield Finding("bound_worker", f"{shown(each)} serves job {each.only_job} alone")
    yield from (_near_miss(case, each) for each in case.around.others[:MOST_NAMES])


def _near_miss(case: Case, worker: SeenWorker) -> Finding:
    flags = shlex.join(worker.spec.command_line()[2:])
    return Finding(
        "near_miss",
        f"{shown(worker)} holds {worker.spec}, and this job needs {case.job.spec}",
        f"if you meant that one: `batchmill cancel {case.job.id}`, and submit again with {flags}",
    )


def _gone(case: Case, worker: SeenWorker) -> Finding:
    if worker.state in GIVEN_UP:
        return _given_up(case, worker)
    ended = "stopped" if worker.state is WorkerState.STOPPED else f"was {worker.state.value} and is dead or unreachable"
    return Finding("worker_gone", f"{shown(worker)} {ended}, last seen {duration(worker.seen_seconds)} ago")


def _given_up(case: Case, worker: SeenWorker, *, all_of_them: bool = False) -> Finding:
    """A worker that is sick, or whose model cannot be loaded."""
    code = "sick" if worker.state is WorkerState.SICK else "load_failed"
    before = f"no worker of {case.job.spec} is left: " if all_of_them else ""
    remedy = f"{advice(worker.state)}{case.start}"
    message = f"{before}{given_up_line(worker)}"
    return Finding(f"all_{code}" if all_of_them else f"worker_{code}", message, remedy, stuck=all_of_them)


def _ordinal(number: int) -> str:
    """`1st`, `2nd`, `13th`."""
    ends = {1: "st", 2: "nd", 3: "rd"}
    return f"{number}{'th' if number % 100 in (11, 12, 13) else ends.get(number % 10, 'th')}"
