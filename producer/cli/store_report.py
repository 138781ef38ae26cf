"""The report of `batchmill db check`: a line for each thing that is wrong in a store, as it is found."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from batchmill.jobs.runtime.command_errors import say
from batchmill.jobs.store.store import Store


def report(store: Store, *, as_json: bool) -> int:
    """Checks the store and prints what is wrong; returns the exit code."""
    job_ids = store.checking.job_ids()
    violations = []
    for violation in store.checking.findings(job_ids):
        violations.append(violation)
        if not as_json:
            where = f"job {violation.job_id}: " if violation.job_id else ""
            click.echo(f"FAIL  {violation.check:<6}  {where}{violation.text}")
    if as_json:
        click.echo(json.dumps([asdict(violation) for violation in violations]))
    looked = f"{len(job_ids)} job{'' if len(job_ids) == 1 else 's'} of {store.database.name} checked"
    if not violations:
        say(f"{looked}: no problems")
        return 0
    say(
        f"{looked}: problems found; stop its workers and restore a backup, or save the answers "
        "with `batchmill results JOB -o FILE`"
    )
    return 1
