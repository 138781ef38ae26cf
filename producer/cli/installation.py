"""The commands about the installation: doctor, and db with its own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from batchmill.producer.cli.commands import Command
from batchmill.producer.cli.completion import complete_job, complete_model

if TYPE_CHECKING:
    from batchmill.jobs.store.store import Store


@click.group(epilog="Example: batchmill db upgrade")
def db() -> None:
    """Manage the tables of the store."""


@db.command(
    cls=Command,
    short_help="Upgrade the tables to this version's revision.",
    epilog="Example: BATCHMILL_DATABASE_URL=postgresql://mill@db/mill batchmill db upgrade",
)
def upgrade() -> None:
    """Upgrade the store's tables to the revision that this version of batchmill uses."""
    from batchmill.jobs.configuration.settings import load_settings
    from batchmill.migrations import revisions

    settings = load_settings()
    if settings.embedded_store:
        revisions.open_store(settings).close()
    else:
        revisions.check_disk(settings.database)
        revisions.upgrade(settings.database)
    click.echo(f"the store is at revision {_revision()[0]}", err=True)


@db.command(cls=Command, short_help="Show the revision of the tables.", epilog="Example: batchmill db current --json")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def current(as_json: bool) -> None:
    """Show the revision of the store, and the one that this version of batchmill uses."""
    import json

    revision, works_with = _revision()
    if as_json:
        click.echo(json.dumps({"revision": revision, "works_with": works_with}))
    else:
        click.echo(f"{revision or 'no tables'} (this batchmill works with {works_with})")


@db.command(
    "new-id",
    cls=Command,
    short_help="Give a copied store its own id.",
    epilog="Example: BATCHMILL_DATABASE_URL=postgresql://mill@db/copy batchmill db new-id",
)
def new_id() -> None:
    """Give a copied store its own id, so that it shares no queue and no spool with the original.

    A store that was restored in place of the original keeps its id. Stop the copy's workers first, and start them again
    afterwards.
    """
    from batchmill.jobs.configuration.settings import load_settings
    from batchmill.migrations import revisions

    store = revisions.open_store(load_settings())
    try:
        click.echo(f"the store {store.database.name} has the id {store.own_id.renew()}", err=True)
    finally:
        store.close()


@db.command(
    cls=Command, short_help="Check the whole store without writing.", epilog="Example: batchmill db check --json"
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def check(as_json: bool) -> None:
    """Check the whole store without writing: damage, lost rows, wrong counts and states.

    Prints a line for each problem; the exit code is 1 if there is one. Workers may keep running.
    """
    from batchmill.producer.cli.store_report import report

    with _read_only_store() as store:
        store.check_revision()
        sys.exit(report(store, as_json=as_json))


def _revision() -> tuple[str | None, str]:
    from batchmill.jobs.store.tables import REVISION

    with _read_only_store() as store:
        return store.revision(), REVISION


@contextmanager
def _read_only_store() -> Iterator[Store]:
    from batchmill.jobs.configuration.settings import load_settings
    from batchmill.jobs.runtime.home import try_home
    from batchmill.jobs.store.store import Store

    settings = load_settings()
    if settings.embedded_store and not settings.database_file.exists():
        try_home(settings.home)
    store = Store(settings.database, busy_seconds=settings.busy_seconds, read_only=True)
    try:
        yield store
    finally:
        store.close()


@click.command(cls=Command, epilog="Example: batchmill doctor last")
@click.argument("job", required=False, shell_complete=complete_job)
@click.option("-m", "--model", shell_complete=complete_model, help="Also check that this model can be read here.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(job: str | None, model: str | None, as_json: bool) -> None:
    """Check this installation, or explain why JOB makes no progress and what to do.

    Without JOB: a line for each check, with the fix; exit code 1 if a required one fails. With JOB (an id, the
    beginning of one, or `last`): exit code 1 if it is stuck until you act, 0 if it runs, waits or has ended.
    """
    from batchmill.jobs.configuration.settings import load_settings

    if job is not None and model is not None:
        raise click.UsageError("JOB says which model it wants: leave --model out")
    settings = load_settings()
    if job is None:
        from batchmill.producer.cli.doctor import examine, report

        sys.exit(report(examine(settings, model=model), as_json=as_json))
    import json

    from batchmill.producer.views.diagnosis.verdict import examine_job

    diagnosis = examine_job(settings, job)
    click.echo(json.dumps(diagnosis.to_json()) if as_json else "\n".join(diagnosis.lines()))
    sys.exit(diagnosis.exit_code)


COMMANDS: tuple[click.Command, ...] = (doctor, db)
