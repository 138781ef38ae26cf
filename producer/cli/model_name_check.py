"""What commands do about the name of a model that is likely a slip: warn, or refuse what would wait for nobody."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import click

from batchmill.jobs.errors import PromptFileError
from batchmill.jobs.models import misspellings
from batchmill.jobs.models.misspellings import meant_instead, slip_line
from batchmill.jobs.models.spec import ModelSpec
from batchmill.jobs.store.store import Store
from batchmill.producer.submit import Submission


def warn_of_slip(spec: ModelSpec, *, store: Store) -> None:
    """Says so on stderr: the user may know better."""
    if (meant := meant_instead(spec, served=store.workers.models())) is not None:
        click.echo(f"warning: {slip_line(spec, meant)}", err=True)


@contextmanager
def asked_first(submission: Submission, *, store: Store) -> Iterator[None]:
    """Asks about a name that is likely a slip before a file's bad lines are told, which may be bad by it alone."""
    try:
        yield
    except PromptFileError:
        if submission.model is not None:
            warn_of_slip(submission.spec(submission.model), store=store)
        raise


def refuse_slip(spec: ModelSpec, *, store: Store) -> None:
    """Raises UsageError."""
    misspellings.refuse_slip(spec, served=store.workers.models())
