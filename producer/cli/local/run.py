"""The run of one file on this machine: an earlier job of it or a new one, answered here, and its export.

It starts processes and reads the store. The worker is a process of its own, and nothing of its room is imported.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click

from batchmill.jobs.advice import start_words
from batchmill.jobs.broker.client import Broker
from batchmill.jobs.broker.embedded import MillLock
from batchmill.jobs.configuration.settings import Settings
from batchmill.jobs.errors import AlreadyRunning, BrokerUnavailable
from batchmill.jobs.models.adapters import Adapter
from batchmill.jobs.models.spec import ModelSpec
from batchmill.jobs.requests.states import WorkerState
from batchmill.jobs.runtime.counted import counted
from batchmill.jobs.runtime.files.formats import written_as
from batchmill.jobs.runtime.home import use_store
from batchmill.jobs.runtime.log_file import rotate_if_large
from batchmill.jobs.runtime.sizes import size
from batchmill.jobs.store.store import Store
from batchmill.jobs.store.views.jobs import Job
from batchmill.migrations.revisions import open_store
from batchmill.producer.cli.local.earlier import choose
from batchmill.producer.cli.local.mill import ended_by_signal, own_redis, require_embedded
from batchmill.producer.cli.local.workers import LocalWorkers
from batchmill.producer.cli.model_name_check import refuse_slip
from batchmill.producer.cli.progress import follow, require_success, say_goes_on
from batchmill.producer.cli.text.device_lines import memory_lines
from batchmill.producer.cli.text.job_lines import seconds_line
from batchmill.producer.files.export import export
from batchmill.producer.submission import Submission
from batchmill.producer.submit import load_job, send_wakeups
from batchmill.producer.views.finish import finish_line
from batchmill.producer.views.gone_workers import seen_here
from batchmill.producer.views.status import JobStatus

#: The states of a worker that takes work now, or once it has loaded its model.
_TAKING = (WorkerState.STARTING, WorkerState.LOADING, WorkerState.READY)


@dataclass(frozen=True, slots=True)
class OwnWorker:
    """The worker that a `run` starts."""

    device: str
    words: Sequence[str]  #: further words of its command line
    is_asked_for: bool  #: the user configured it, so that no other worker will do


def run_file(submission: Submission, *, out: Path | None, worker: OwnWorker, new: bool, settings: Settings) -> None:
    """Runs one file to its end and exports it; a job of the same file and options is continued.

    Where an `up` of this home holds the model, its workers answer. Raises NotAllSucceeded after the export when some
    requests did not succeed, and AlreadyRunning where another `run` or `up` is of no help.
    """
    require_embedded(settings)
    spec = submission.spec(str(submission.model))
    with ExitStack() as stack:
        stack.enter_context(ended_by_signal())
        other = None
        try:
            stack.enter_context(MillLock(settings.home))
        except AlreadyRunning as busy:
            other = _worker_of_mill(submission, spec, worker, settings=settings, busy=busy)
        store = open_store(settings)
        refuse_slip(spec, store=store)
        job = None if new else _earlier_job(submission, spec, store=store, settings=settings)
        if job is None or not job.closed:
            if other is None:
                job = _work_off(submission, job, spec, worker, new=new, settings=settings, store=store)
            else:
                click.echo(f"worker {other}, which already holds {spec} here, answers it", err=True)
                job = job or _new_job(submission, store=store, settings=settings)
                _wait_for_mill(job, again=_again(submission, new=new), settings=settings, store=store)
        _deliver(job.id, store, out, settings)


def _earlier_job(submission: Submission, spec: ModelSpec, *, store: Store, settings: Settings) -> Job | None:
    """Finds and announces the job that an earlier run of the same file, model and options left, if there is one."""
    fingerprint = submission.fingerprint_of_file(spec)
    if fingerprint is None:
        return None  # every run of a stream is a new one
    job = choose(store.jobs.resumable(fingerprint), spec, submission.adapters, home=settings.home)
    if job is not None:
        note = "ran this file before; --new runs it again" if job.closed else "continues where it was interrupted"
        click.echo(f"job {job.id} {note}", err=True)
    return job


def _new_job(
    submission: Submission, *, store: Store, settings: Settings, stored: Callable[[str], None] = lambda _: None
) -> Job:
    """Stores the file as a new job; `stored` is called after each page of it."""
    job_id, spec = load_job(submission, store=store, settings=settings, stored=stored)
    job = store.jobs.job(job_id)
    click.echo(f"job {job.id}: {counted(job.counts.total, 'request')} for {spec}", err=True)
    return job


def _worker_of_mill(
    submission: Submission, spec: ModelSpec, worker: OwnWorker, *, settings: Settings, busy: AlreadyRunning
) -> str:
    """The name of a worker of the running mill that may answer this file. Raises AlreadyRunning where there is none."""
    store = open_store(settings)
    try:
        refuse_slip(spec, store=store)
        rows = [seen_here(each) for each in store.workers.rows(spec=spec)]
    finally:
        store.close()
    serving = [each for each in rows if each.alive and each.only_job is None and each.state in _TAKING]
    able = [each for each in serving if _holds_all(each.adapters, submission.adapters)]
    if not able:
        raise busy
    if worker.is_asked_for:
        raise AlreadyRunning(
            f"{busy}; worker {able[0].name} there holds {spec}, and answers this file if you omit the flags that "
            "configure a worker (--device and those of the engine)"
        )
    return able[0].name


def _holds_all(held: Sequence[Adapter], wanted: Sequence[Adapter]) -> bool:
    by_name = {each.name: each for each in held}
    return all(each.name in by_name and each.agrees_with(by_name[each.name]) for each in wanted)


def _again(submission: Submission, *, new: bool) -> str | None:
    """The command that continues the job of this one, for people; None where a stream has been read."""
    if submission.is_stream:
        return None
    return "the same command without --new" if new else "the same command"


def _wait_for_mill(job: Job, *, again: str | None, settings: Settings, store: Store) -> None:
    """Has the running mill work the job off, and waits for its end."""
    try:
        send_wakeups(job.spec, store=store, broker=Broker.of(settings))
    except BrokerUnavailable as error:
        click.echo(f"workers will find it without a wake-up: {error}", err=True)
    try:
        follow(store, job.id, settings=settings)
    except KeyboardInterrupt:
        say_goes_on(job.id, again=again or f"`batchmill wait {job.id}`")
        raise


def _work_off(
    submission: Submission,
    job: Job | None,
    spec: ModelSpec,
    worker: OwnWorker,
    *,
    new: bool,
    settings: Settings,
    store: Store,
) -> Job:
    """Works this job off, or a new one of the file, whose worker loads the model while the file is being read."""
    log_path = settings.home / "worker.log"
    rotate_if_large(log_path)
    with use_store(settings.home), own_redis(settings) as redis, log_path.open("ab") as log, ExitStack() as stack:
        begins_at = log.tell()
        workers: list[LocalWorkers] = []

        def work_on(job_id: str) -> None:
            """Starts the worker once, and raises where it has ended."""
            if not workers:
                words = [*worker.words, "--job", job_id]
                workers.append(LocalWorkers(spec, devices=[worker.device], words=words, settings=settings, log=log))
                stack.callback(workers[0].stop)
            workers[0].check(log_path, begins_at)
            redis.tend()

        if job is None:
            job = _new_job(submission, store=store, settings=settings, stored=work_on)
        send_wakeups(spec, store=store, broker=Broker.of(settings))
        try:
            follow(store, job.id, name_missing=False, check=partial(work_on, job.id), settings=settings)
        except KeyboardInterrupt:
            adapters = [str(each) for each in submission.adapters]
            up = ["batchmill", "up", *start_words(spec, settings, adapters=adapters)[2:]]
            again = _again(submission, new=new) or f"`{shlex.join(up)}`"
            click.echo(f"stopping: finished outputs are saved; {again} continues job {job.id}", err=True)
            raise
    return job


def _deliver(job_id: str, store: Store, out: Path | None, settings: Settings) -> None:
    status = JobStatus.read(store, job_id, settings)
    export(store, status.job, out=out, form=written_as(out), only="all")
    for line in _report(status):
        click.echo(line, err=True)
    if out is not None:
        click.echo(f"answers: {out}", err=True)
    require_success(status)


def _report(status: JobStatus) -> list[str]:
    counts, memory = status.job.counts, status.usage.memory
    return [
        f"requests   {counts.succeeded:,} succeeded, {counts.failed:,} failed, {counts.cancelled:,} cancelled",
        *([f"finished   {finished}"] if (finished := finish_line(status.job)) else []),
        f"tokens     {counts.prompt_tokens:,} prompt, {counts.completion_tokens:,} completion",
        f"tokens/s   {status.prompt_tokens_per_second:,.1f} prompt, "
        f"{status.per_second(counts.completion_tokens):,.1f} completion",
        f"memory     {size(memory.weights_bytes)} weights, peak {size(memory.peak_allocated_bytes)} allocated, "
        f"{size(memory.peak_reserved_bytes)} reserved of {size(memory.device_total_bytes)}",
        *(f"{title:<9}  {line}" for title, line in memory_lines(memory)),
        f"seconds    {seconds_line(status)}",
    ]
