"""Warnings about, and refusals of, a model's name that is likely a slip; a wait for its worker would not end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import click

from batchmill.jobs.errors import PromptFileError
from batchmill.jobs.models import misspellings
from batchmill.jobs.models.misspellings import meant_instead, slip_line
from batchmill.jobs.models.spec import ModelSpec
from batchmill.jobs.store.store import Store
from batchmill.producer.submission import Submission


def warn_of_slip(spec: ModelSpec, *, store: Store) -> None:
    """Warns on stderr where the name is likely a slip: the user may know better."""
    if (meant := meant_instead(spec, served=store.workers.models())) is not None:
        click.echo(f"warning: {slip_line(spec, meant)}", err=True)


@contextmanager
def asked_first(submission: Submission, *, store: Store) -> Iterator[None]:
    """Warns of a likely slip before a file's bad lines are reported, which may be bad by the name alone."""
    try:
        yield
    except PromptFileError:
        if submission.model is not None:
            warn_of_slip(submission.spec(submission.model), store=store)
        raise


def refuse_slip(spec: ModelSpec, *, store: Store) -> None:
    """Raises UsageError where the name is likely a slip."""
    misspellings.refuse_slip(spec, served=store.workers.models())
