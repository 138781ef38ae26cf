"""The commands about jobs and workers that exist: status, jobs, workers, wait, results, cancel, retry, logs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from batchmill.jobs.runtime.files.formats import ANSWERS, FORMAT_HELP, OUT_HELP, written_as
from batchmill.jobs.runtime.fitted import fitted, terminal_width
from batchmill.producer.cli.commands import Command
from batchmill.producer.cli.completion import LAST, complete_job

if TYPE_CHECKING:
    from batchmill.jobs.configuration.settings import Settings
    from batchmill.jobs.store.store import Store

_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_MOST_JOBS = 20
#: The time for which a worker is listed whose model cannot be loaded, or whose device is sick.
_GIVEN_UP_SHOWN_SECONDS = 86_400


def _open() -> tuple[Settings, Store]:
    from batchmill.jobs.configuration.settings import load_settings
    from batchmill.migrations.revisions import open_store

    settings = load_settings()
    return settings, open_store(settings)


@click.command(cls=Command, epilog="Example: batchmill status last --watch")
@click.argument("job", default=LAST, shell_complete=complete_job)
@click.option("--watch", is_flag=True, help="Follow the job until it ends.")
@_JSON
def status(job: str, watch: bool, as_json: bool) -> None:
    """Show the progress of JOB, its workers, its speed, and when it ends.

    JOB is an id, the beginning of one, or `last`.
    """
    from batchmill.producer.cli.text.job_lines import job_lines
    from batchmill.producer.reconcile_once import tidy
    from batchmill.producer.views.public_json import status_json
    from batchmill.producer.views.status import JobStatus

    settings, store = _open()
    tidy(settings)
    job_id = store.jobs.find(job)
    if watch:
        from batchmill.producer.cli.progress import wait_for

        wait_for(store, job_id, settings=settings)
    shown = JobStatus.read(store, job_id, settings)
    lines = [json.dumps(status_json(shown))] if as_json else fitted(job_lines(shown), indent=13, width=terminal_width())
    click.echo("\n".join(lines))


@click.command(cls=Command, epilog="Example: batchmill jobs --json")
@click.option(
    "-n", "most", type=click.IntRange(1), default=_MOST_JOBS, show_default=True, help="Number of jobs to list."
)
@_JSON
def jobs(most: int, as_json: bool) -> None:
    """List the newest jobs: when each was submitted, how long it has run, and how many requests it has answered.

    DURATION is the time from the first batch to the end of the job, or until now.
    """
    from batchmill.jobs.requests.states import JobState
    from batchmill.producer.cli.text.job_table import table
    from batchmill.producer.views.public_json import job_json
    from batchmill.producer.views.status import JobStatus

    settings, store = _open()
    newest = store.jobs.jobs(most=most)
    at_work = {each.id: JobStatus.read(store, each.id, settings) for each in newest if each.state is JobState.RUNNING}
    if as_json:
        estimates = {job_id: each.estimate for job_id, each in at_work.items()}
        click.echo(json.dumps([job_json(each, estimates.get(each.id)) for each in newest]))
        return
    if not newest:
        click.echo("no jobs yet; `batchmill run` and `batchmill submit` create one", err=True)
        return
    notes = {job_id: f"ends in {each.ends_in}" if each.estimate else each.ends_in for job_id, each in at_work.items()}
    click.echo("\n".join(table(newest, notes=notes, now=store.jobs.now(), width=terminal_width())))


@click.command(cls=Command, epilog="Example: batchmill workers --all")
@click.option("--all", "everyone", is_flag=True, help="Include workers that have ended.")
@_JSON
def workers(everyone: bool, as_json: bool) -> None:
    """List the live workers with their model, device and state, and those that gave up in the last 24 hours."""
    from batchmill.jobs.advice import mill_starts_workers, start_verb
    from batchmill.jobs.store.workers.liveness import GIVEN_UP
    from batchmill.producer.cli.text.device_lines import device_line
    from batchmill.producer.cli.text.worker_line import worker_line
    from batchmill.producer.views.gone_workers import seen_here
    from batchmill.producer.views.public_json import worker_json

    settings, store = _open()
    rows = [seen_here(each) for each in store.workers.rows(only_alive=False)]
    listed = [
        each
        for each in rows
        if everyone or each.alive or (each.state in GIVEN_UP and each.seen_seconds < _GIVEN_UP_SHOWN_SECONDS)
    ]
    if as_json:
        click.echo(json.dumps([worker_json(each) for each in listed]))
        return
    if not listed and mill_starts_workers(settings):
        click.echo("no live worker yet; the mill here is starting its worker", err=True)
    elif not listed:
        click.echo(f"no live worker; `batchmill {start_verb(settings)} -m MODEL` starts one", err=True)
    for each in listed:
        lines = [worker_line(each)]
        lines += [f"  {device_line(device, now=True)}" for device in each.devices if each.alive]
        click.echo("\n".join(fitted(lines, indent=4, width=terminal_width())))


@click.command(cls=Command, epilog="Example: batchmill wait last --timeout 3600")
@click.argument("job", default=LAST, shell_complete=complete_job)
@click.option(
    "--timeout", type=click.FloatRange(min=0), metavar="SECONDS", help="Give up after this time (exit code 124)."
)
@_JSON
def wait(job: str, timeout: float | None, as_json: bool) -> None:
    """Wait until JOB ends. The exit code is 5 if not every request succeeded."""
    from batchmill.producer.cli.progress import require_success, say_ended, wait_for

    settings, store = _open()
    ended = wait_for(store, store.jobs.find(job), timeout_seconds=timeout, settings=settings)
    if as_json:
        from batchmill.producer.views.public_json import status_json

        click.echo(json.dumps(status_json(ended)))
    say_ended(ended)
    require_success(ended)


@click.command(cls=Command, epilog="Example: batchmill results last --format openai -o answers.jsonl")
@click.argument("job", default=LAST, shell_complete=complete_job)
@click.option("-o", "--out", type=click.Path(path_type=Path), help=OUT_HELP)
@click.option(
    "--format",
    "form",
    type=click.Choice(ANSWERS),
    help=FORMAT_HELP,
)
@click.option(
    "--only",
    type=click.Choice(["all", "succeeded", "failed"]),
    default="all",
    show_default=True,
    help="Outputs to write; cancelled requests count as failed.",
)
def results(job: str, out: Path | None, form: str | None, only: str) -> None:
    """Write the outputs of JOB in file order; of a running job, those finished so far.

    With --format openai and -o, errors go to a second file, with .errors before the suffix.
    """
    from batchmill.jobs.configuration.settings import load_settings
    from batchmill.jobs.runtime.failpoints import arm
    from batchmill.migrations.revisions import open_store
    from batchmill.producer.files.export import check_out, export

    settings = load_settings()
    arm(settings.failpoint, home=settings.home)
    form = written_as(out, form)
    check_out(out, form=form, keep=settings.files)
    store = open_store(settings)
    stored = store.jobs.job(store.jobs.find(job))
    exported = export(store, stored, out=out, form=form, only=only)
    if out is not None:
        click.echo(exported.line(out, total=stored.counts.total), err=True)


@click.command(cls=Command, epilog="Example: batchmill cancel last")
@click.argument("job", shell_complete=complete_job)
def cancel(job: str) -> None:
    """Cancel JOB: finished outputs are kept, all other requests end as `cancelled`."""
    from batchmill.producer.reconcile_once import tidy
    from batchmill.producer.views.finish import answered_line

    settings, store = _open()
    job_id = store.jobs.find(job)
    before = store.jobs.job(job_id)
    if before.closed:
        click.echo(f"job {job_id} has ended already: {before.state.value}, {answered_line(before)}", err=True)
        return
    store.closing.cancel(job_id)
    tidy(settings)
    after = store.jobs.job(job_id)
    click.echo(f"job {job_id} is {after.state.value}: {answered_line(after)}", err=True)


@click.command(cls=Command, epilog="Example: batchmill retry last")
@click.argument("job", shell_complete=complete_job)
@click.option(
    "--all", "everything", is_flag=True, help="Also retry requests that failed because of their line or length."
)
def retry(job: str, everything: bool) -> None:
    """Retry the failed and cancelled requests of JOB that may succeed now; successful outputs are kept.

    Requests that failed because of their line (a bad schema, an unsupported option) are listed and skipped, as are
    prompts that are too long for the context of every live worker.
    """
    from batchmill.jobs.broker.client import Broker
    from batchmill.jobs.errors import BrokerUnavailable
    from batchmill.producer.submit import send_wakeups
    from batchmill.producer.views.retries import chances_of, retry_lines
    from batchmill.producer.views.status import JobStatus

    settings, store = _open()
    stored = store.jobs.job(store.jobs.find(job))
    chances = chances_of(stored, everything=everything, store=store)
    retried = store.retries.retry(stored.id, chances)
    status = JobStatus.read(store, stored.id, settings)
    try:
        if status.missing_seconds is None and not status.job.closed:
            send_wakeups(stored.spec, store=store, broker=Broker.of(settings))
    except BrokerUnavailable as error:
        click.echo(f"workers will find it without a wake-up: {error}", err=True)
    for line in retry_lines(status, retried, chances):
        click.echo(line, err=True)


@click.command(cls=Command, epilog="Example: batchmill logs last --level warning --follow")
@click.argument("which", metavar="[WORKER|JOB]", required=False, shell_complete=complete_job)
@click.option("--follow", is_flag=True, help="Keep printing new lines until Ctrl-C.")
@click.option(
    "--level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    help="Show only lines of this level or above.",
)
def logs(which: str | None, follow: bool, level: str | None) -> None:
    """Show the logs of this machine's workers, merged by time: of all, of one, or only lines about JOB.

    WORKER is a name or an id from `batchmill workers`; JOB is an id, the beginning of one, or `last`. The files are in
    BATCHMILL_HOME/logs, rotated at 10 MiB, and contain no prompts or answers.
    """
    from batchmill.jobs.configuration.settings import load_settings
    from batchmill.producer.cli.logs import choose, show

    chosen = choose(which, level=level, settings=load_settings())
    show(chosen, follow=follow)


COMMANDS: tuple[click.Command, ...] = (status, jobs, workers, wait, results, cancel, retry, logs)
