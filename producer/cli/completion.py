"""Completions for a shell while a command is typed: the ids of jobs, models and files.

They read the store as `status` does, create none, and report no failure: the user is in the middle of a line.
"""

from __future__ import annotations

import io
from contextlib import redirect_stderr
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem

from batchmill.jobs.errors import BatchmillError

if TYPE_CHECKING:
    from batchmill.jobs.store.views.jobs import Job

_MOST_JOBS = 50
_BUSY_SECONDS = 0.5
LAST = "last"


def complete_job(_ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The newest jobs, each with its state and name, and `last` before them."""
    jobs = _newest_jobs()
    words = {LAST: "the newest job"} if jobs else {}
    words |= {each.id: _told(each) for each in jobs}
    return [CompletionItem(word, help=about) for word, about in words.items() if word.startswith(incomplete.lower())]


def complete_model(_ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The models that are known here, else folders."""
    from batchmill.jobs.models.hub_cache import known_names

    return [*map(CompletionItem, known_names(incomplete))] or [CompletionItem(incomplete, type="dir")]


def complete_file(_ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The shell's own files."""
    return [CompletionItem(incomplete, type="file")]


def _newest_jobs() -> list[Job]:
    from batchmill.jobs.configuration.settings import load_settings
    from batchmill.jobs.store.store import Store
    from batchmill.jobs.store.tables import REVISION

    with redirect_stderr(io.StringIO()):
        try:
            settings = load_settings()
            store = Store(settings.database, busy_seconds=_BUSY_SECONDS, read_only=True)
            try:
                return store.jobs.jobs(most=_MOST_JOBS) if store.revision() == REVISION else []
            finally:
                store.close()
        except (BatchmillError, OSError):
            return []


def _told(job: Job) -> str:
    """A job in one line of printable characters, which a terminal takes for text; fish shows it up to a comma."""
    text = f"{job.state.value} {job.spec} {job.name or job.file_name}"
    return "".join(each if each.isprintable() else " " for each in text)
