"""Following a job from a terminal: a live line where stderr is one, else a line now and then."""

from __future__ import annotations

import time
from collections.abc import Callable
from time import monotonic

import click
from rich.console import Console
from rich.live import Live

from batchmill.jobs.configuration.settings import Settings
from batchmill.jobs.errors import NotAllSucceeded, StoreError, WaitTimedOut
from batchmill.jobs.requests.states import JobState
from batchmill.jobs.runtime.counted import counted
from batchmill.jobs.runtime.waiting import FIRST_SECONDS
from batchmill.jobs.store.store import Store
from batchmill.producer.cli.text.live_line import LiveLine
from batchmill.producer.cli.text.worker_line import loading_line
from batchmill.producer.views.finish import answered_line, finish_line
from batchmill.producer.views.reasons import missing_lines
from batchmill.producer.views.status import JobStatus

_FIRST_PAUSE_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 1.0
#: The least time between two lines of one phase without a terminal, and between two about a store that is away.
_LINE_SECONDS = 10.0


def follow(
    store: Store,
    job_id: str,
    *,
    timeout_seconds: float | None = None,
    name_missing: bool = True,
    check: Callable[[], None] = lambda: None,
    settings: Settings | None = None,
) -> JobStatus:
    """Waits until a job has ended; `check` is called between two looks and may raise.

    `name_missing`: what the job lacks is shown while no worker serves its model.
    `settings`: those that such a worker would be started with.

    Raises WaitTimedOut.
    """
    deadline = None if timeout_seconds is None else monotonic() + timeout_seconds
    shown = _WaitDisplay(name_missing)
    pause = _FIRST_PAUSE_SECONDS
    with shown:
        while True:
            status = _answered(store, job_id, shown, settings)
            if status is not None:
                shown.show(status)
                if status.job.closed:
                    return status
            check()
            left = pause if deadline is None else min(pause, deadline - monotonic())
            if left <= 0:
                away = "in an unknown state (the store cannot be reached)"
                state = away if status is None else f"still {status.job.state.value}"
                raise WaitTimedOut(f"job {job_id} is {state} after {timeout_seconds:g} s")
            time.sleep(left)
            pause = min(1.5 * pause, _LONGEST_PAUSE_SECONDS)


def wait_for(
    store: Store, job_id: str, *, timeout_seconds: float | None = None, settings: Settings | None = None
) -> JobStatus:
    """`follow` for a job that goes on without this command, which says so at Ctrl-C. Raises WaitTimedOut."""
    try:
        return follow(store, job_id, timeout_seconds=timeout_seconds, settings=settings)
    except KeyboardInterrupt:
        say_goes_on(job_id, again=f"`batchmill wait {job_id}`")
        raise


def say_goes_on(job_id: str, *, again: str) -> None:
    """Says that a job outlives the command that followed it; `again`: the one that follows it again."""
    click.echo(f"job {job_id} keeps running; {again} waits again, `batchmill cancel {job_id}` cancels it", err=True)


def _answered(store: Store, job_id: str, shown: _WaitDisplay, settings: Settings | None) -> JobStatus | None:
    """The job's status; None while the store is away, which a job outlives, and a wait for it, too."""
    try:
        return JobStatus.read(store, job_id, settings)
    except StoreError as error:
        if not error.retryable:
            raise
        shown.say(f"waiting for the store: {error}")
        return None


def say_ended(status: JobStatus) -> None:
    """Says on stderr how the answers of an ended job finished, where that is known."""
    finished = finish_line(status.job)
    if finished is not None:
        click.echo(f"{status.job.id} finished: {finished}", err=True)


def require_success(status: JobStatus) -> None:
    """Raises NotAllSucceeded for an ended job of which some requests failed or were cancelled."""
    counts = status.job.counts
    if status.job.state is JobState.COMPLETED and counts.succeeded == counts.total:
        return
    raise NotAllSucceeded(
        f"job {status.job.id} is {status.job.state.value}: {answered_line(status.job)}, {counts.failed:,} failed, "
        f"{counts.cancelled:,} were cancelled; `batchmill results {status.job.id} --only failed` shows them"
    )


class _WaitDisplay:
    """The display that a user sees while waiting."""

    def __init__(self, name_missing: bool) -> None:
        self._name_missing = name_missing
        self._console = Console(stderr=True)
        self._live: Live | None = None
        if self._console.is_terminal:
            self._live = Live(console=self._console, transient=True, auto_refresh=False)
        self._next_line_at = 0.0
        self._last_line = ""
        self._last_phase: str | None = None

    def __enter__(self) -> None:
        if self._live is not None:
            self._live.start()

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, status: JobStatus) -> None:
        job = status.job
        ended = job.counts.total - job.counts.pending
        advice, note = self._advice(status), self._note(status)
        if self._live is not None:
            shown = LiveLine(f"{job.id} {job.state.value}", ended, job.counts.total, note, advice)
            self._live.update(shown, refresh=True)
            return
        note = note or " ".join(advice)
        count = f"{ended:,}/{counted(job.counts.total, 'request')} ended"
        line = f"{job.id} {job.state.value}: {count}{note and f', {note}'}"
        phase = _phase(status)
        if line != self._last_line and (monotonic() >= self._next_line_at or job.closed or phase != self._last_phase):
            click.echo(line, err=True)
            self._last_line, self._last_phase, self._next_line_at = line, phase, monotonic() + _LINE_SECONDS

    def say(self, line: str) -> None:
        """Prints a line about the waiting itself, once in a while."""
        if monotonic() >= self._next_line_at:
            self._console.print(line, markup=False, highlight=False)
            self._next_line_at = monotonic() + _LINE_SECONDS

    def _advice(self, status: JobStatus) -> tuple[str, ...]:
        return tuple(missing_lines(status)) if self._name_missing and _is_unserved(status) else ()

    def _note(self, status: JobStatus) -> str:
        if _is_unserved(status):
            return "" if self._name_missing else "the worker is starting"
        if status.loading and not status.workers:
            first = status.loading[0]
            return f"worker {first.name} is {loading_line(first)}"
        if status.estimate is None:
            return status.ends_in
        recent = status.usage.recent_requests_per_second
        speed = f"{recent:,.1f} requests/s now, " if recent else ""
        return f"{speed}ends in {status.ends_in}"


def _is_unserved(status: JobStatus) -> bool:
    return status.missing_seconds is not None or bool(status.lacks and not status.workers)


def _phase(status: JobStatus) -> str | None:
    """The phase of loading, torch or the model, that has lasted long enough to be news; None where there is none."""
    if not status.loading or status.workers:
        return None
    first = status.loading[0]
    torch_seconds, seconds = first.torch_load_seconds, first.loading_seconds or 0.0
    of_phase, phase = (seconds, "torch") if torch_seconds is None else (seconds - torch_seconds, "the model")
    return phase if of_phase >= FIRST_SECONDS else None
