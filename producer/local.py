"""The whole mill on one machine: Redis, store and supervised workers, for `run` (one file) and `up` (until Ctrl-C).

It starts processes and reads the store; what a worker does is the worker's own affair, so nothing of it is imported.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO

import click

from jobs.broker import Broker
from jobs.embedded import EmbeddedRedis, MillLock, end_leftover, start_process, stop_process
from jobs.errors import BatchmillError, UsageError
from jobs.settings import Settings, environment_of
from jobs.sizes import size
from jobs.spec import ModelSpec
from jobs.store import Store
from migrations import open_store
from producer.device_lines import memory_lines
from producer.progress import follow, require_success
from producer.results import export
from producer.status import JobStatus, duration
from producer.submit import Submission, load_job, send_wakeups

#: Beyond the workers' own drain and kill, the supervisor gets so long before it is killed.
_STOP_MARGIN_SECONDS = 6.0
_LAST_LOG_LINES = 15


def run_file(
    submission: Submission,
    *,
    out: Path | None,
    device: str,
    worker_words: Sequence[str],
    new: bool,
    settings: Settings,
) -> None:
    """Runs one file to its end and exports it; a job of the same file and options is continued.

    `worker_words`: what else the worker's command line says.

    Raises NotAllSucceeded after the export when some requests did not succeed.
    """
    _require_embedded(settings)
    spec = submission.spec(str(submission.model))
    with MillLock(settings.home), _ended_by_signal():
        store = open_store(settings)
        job_id = None if new else _known_job(submission, spec, store)
        if job_id is None:
            job_id, spec = load_job(submission, store=store, settings=settings)
            click.echo(f"job {job_id}: {store.reading.job(job_id).counts.total:,} requests for {spec}", err=True)
        elif store.reading.job(job_id).closed:
            click.echo(f"job {job_id} has run this file before; --new runs it again", err=True)
        else:
            click.echo(f"job {job_id} goes on where it was interrupted", err=True)
        if not store.reading.job(job_id).closed:
            _work_off(job_id, spec, device=device, worker_words=worker_words, settings=settings, store=store)
        _deliver(job_id, store, out)


def run_mill(spec: ModelSpec, *, devices: Sequence[str], worker_words: Sequence[str], settings: Settings) -> None:
    """Runs Redis and workers until Ctrl-C or SIGTERM; `worker_words`: what else their command line says."""
    _require_embedded(settings)
    with MillLock(settings.home), _ended_by_signal(), _redis(settings):
        open_store(settings).close()
        workers = _Workers(spec, devices=devices, words=worker_words, settings=settings, log=sys.stderr.buffer)
        click.echo(f"the mill is up in {settings.home}; submit from another terminal, Ctrl-C ends it", err=True)
        try:
            workers.wait()
        except KeyboardInterrupt:
            click.echo("ending: what is finished is saved, the rest goes back to the queue", err=True)
        finally:
            workers.stop()
        if workers.failed:
            raise BatchmillError("the workers ended; see the lines above")


def _require_embedded(settings: Settings) -> None:
    for name, url in (("BATCHMILL_BROKER_URL", settings.broker_url), ("BATCHMILL_DATABASE_URL", settings.database_url)):
        if url:
            raise UsageError(f"run and up bring their own Redis and store: unset {name}, or use `submit` and `worker`")


def _known_job(submission: Submission, spec: ModelSpec, store: Store) -> str | None:
    """The job that an earlier run of the same file, model and options left, if there is one."""
    fingerprint = submission.fingerprint_of_file(spec)
    return None if fingerprint is None else store.reading.resumable(fingerprint)  # every run of a stream is a new one


def _work_off(
    job_id: str, spec: ModelSpec, *, device: str, worker_words: Sequence[str], settings: Settings, store: Store
) -> None:
    log_path = settings.home / "worker.log"
    with _redis(settings), log_path.open("wb") as log:
        send_wakeups(spec, store=store, broker=Broker.of(settings))
        workers = _Workers(spec, devices=[device], words=worker_words, settings=settings, log=log, only_job=job_id)
        try:
            follow(store, job_id, name_missing=False, check=lambda: workers.check(log_path))
        except KeyboardInterrupt:
            click.echo("ending: what is finished is saved; the same command continues the job", err=True)
            raise
        finally:
            workers.stop()


def _deliver(job_id: str, store: Store, out: Path | None) -> None:
    status = JobStatus.read(store, job_id)
    export(store, status.job, out=out, form="jsonl", only="all")
    for line in _report(status):
        click.echo(line, err=True)
    if out is not None:
        click.echo(f"answers: {out}", err=True)
    require_success(status)


def _report(status: JobStatus) -> list[str]:
    counts, effort, memory = status.job.counts, status.effort, status.effort.memory
    return [
        f"requests   {counts.succeeded:,} succeeded, {counts.failed:,} failed, {counts.cancelled:,} cancelled",
        f"tokens     {counts.prompt_tokens:,} prompt, {counts.completion_tokens:,} completion",
        f"tokens/s   {status.per_second(counts.prompt_tokens):,.1f} prompt, "
        f"{status.per_second(counts.completion_tokens):,.1f} completion",
        f"memory     {size(memory.weights_bytes)} weights, peak {size(memory.peak_allocated_bytes)} allocated, "
        f"{size(memory.peak_reserved_bytes)} reserved of {size(memory.device_total_bytes)}",
        *(f"{title:<9}  {line}" for title, line in memory_lines(memory)),
        f"seconds    {effort.queued_seconds:.1f} waiting, of which {effort.model_load_seconds:.1f} loading; "
        f"{effort.running_seconds:.1f} running ({duration(effort.running_seconds)})",
    ]


class _Workers:
    """The supervisor of this machine's workers, in a session of its own."""

    def __init__(
        self,
        spec: ModelSpec,
        *,
        devices: Sequence[str],
        words: Sequence[str],
        settings: Settings,
        log: IO[bytes],
        only_job: str | None = None,
    ) -> None:
        self._pid_file = settings.home / "worker.pid"
        self._stop_seconds = settings.drain_seconds + _STOP_MARGIN_SECONDS
        if self._pid_file.exists():
            end_leftover(self._pid_file, named=["-m worker"])
        arguments = [*spec.command_line()[2:], *words]
        if only_job is not None:
            arguments += ["--job", only_job]
        self._process = start_process(
            [sys.executable, "-m", "worker", *arguments, "--devices", ",".join(devices)],
            log=log,
            environ=os.environ | environment_of(settings),
        )
        self._pid_file.write_text(f"{self._process.pid}\n")

    @property
    def failed(self) -> bool:
        return self._process.returncode not in (None, 0)

    def wait(self) -> None:
        self._process.wait()

    def check(self, log_path: Path) -> None:
        """Raises BatchmillError, with the worker's last lines, when it has ended before the job."""
        if self._process.poll() is not None:
            lines = log_path.read_text(errors="replace").splitlines()[-_LAST_LOG_LINES:]
            raise BatchmillError("\n".join(["the worker ended before the job did; its last lines:", *lines]))

    def stop(self) -> None:
        stop_process(self._process, seconds=self._stop_seconds)
        self._pid_file.unlink(missing_ok=True)


@contextmanager
def _redis(settings: Settings) -> Iterator[None]:
    redis = EmbeddedRedis(settings.home)
    redis.start()
    try:
        yield
    finally:
        redis.stop()


@contextmanager
def _ended_by_signal() -> Iterator[None]:
    """SIGTERM ends a mill as Ctrl-C does."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
