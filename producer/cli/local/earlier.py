"""The earlier job of the same file, model and options that a `run` continues, or exports: one of the present model.

A model is known by what it consists of (`jobs.models.identity`), not by where it lies. Nothing is loaded for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import click

from batchmill.jobs.errors import BatchmillError
from batchmill.jobs.models.adapters import Adapter
from batchmill.jobs.models.digests import Digests
from batchmill.jobs.models.hub_cache import cached_commit
from batchmill.jobs.models.identity import Content, differences, of_adapter, of_commit, of_echo, of_model
from batchmill.jobs.models.spec import DEMO, DEMO_FOLDER, ECHO, ModelSpec
from batchmill.jobs.store.views.jobs import Job


def choose(candidates: Sequence[Job], spec: ModelSpec, adapters: Sequence[Adapter], *, home: Path) -> Job | None:
    """The first of these jobs whose answers are those of the present model and adapters; says why, if none is.

    An interrupted job is taken where nobody here can tell: its worker will. Raises ModelError for files that cannot
    be read, and BatchmillError for a finished job of which nobody here can tell whose answers it has.
    """
    present = _Present(spec, adapters, Digests(home))
    reasons = []
    for job in candidates:
        reason = present.other_than(job)
        if reason is None:
            return job
        reasons.append(reason)
    if reasons:
        click.echo(f"{reasons[0]}; running the file again", err=True)
    return None


class _Present:
    """A model and its adapters as this machine has them now; looked at only if a job asks for it."""

    def __init__(self, spec: ModelSpec, adapters: Sequence[Adapter], digests: Digests) -> None:
        self._spec = spec
        self._held = adapters
        self._digests = digests

    @cached_property
    def model(self) -> Content | None:
        """None where it is a model of the Hub that is not in this machine's cache."""
        spec = self._spec
        if spec.model == ECHO:
            return of_echo()
        folder = DEMO_FOLDER if spec.model == DEMO else spec.folder
        if folder is not None:
            return of_model(folder, self._digests)
        return _of_hub(spec.model, spec.revision)

    @cached_property
    def adapters(self) -> dict[str, Content | None]:
        """By name."""
        return {each.name: self._adapter(each) for each in self._held}

    def _adapter(self, adapter: Adapter) -> Content | None:
        if adapter.folder is not None:
            return of_adapter(adapter.folder, self._digests)
        return _of_hub(adapter.path, adapter.revision)

    def other_than(self, job: Job) -> str | None:
        """The reason why a job's answers are not the present model's; None if they are. Raises BatchmillError."""
        if job.identity is None:
            before = f"job {job.id} ran this file before batchmill recorded model files"
            return before if job.closed else None
        changed = list(self._changed(job, job.identity))
        if not changed:
            return None
        other = f"another model; changed since then: {', '.join(changed)}"
        if job.closed:
            return f"job {job.id} ran this file with {other} (`batchmill results {job.id}` writes its answers)"
        return f"job {job.id} was started with {other} (`batchmill cancel {job.id}` closes it)"

    def _changed(self, job: Job, identity: str) -> Iterator[str]:
        """The parts of what the job used that have changed since, for people."""
        if self.model is None:
            _refuse_unknown(job, self._spec.model)
        elif self.model.identity != identity:
            yield differences(identity, self.model.identity)
        for each in job.adapters:
            if each.identity is None:
                continue  # echo reads none
            present = self.adapters[each.name]
            if present is None:
                _refuse_unknown(job, each.path)
            elif present.identity != each.identity:
                yield f"adapter {each.name}"


def _of_hub(name: str, revision: str | None) -> Content | None:
    commit = cached_commit(name, revision)
    return None if commit is None else of_commit(commit)


def _refuse_unknown(job: Job, name: str) -> None:
    """Raises BatchmillError for a finished job; what an interrupted one was begun with, its worker compares."""
    if job.closed:
        raise BatchmillError(
            f"{name} is no longer in this machine's cache, so it is unknown whether the answers of job"
            f" {job.id} are of the same model: `batchmill results {job.id}` writes them, `batchmill models pull {name}`"
            " downloads the model again, and --new runs the file again"
        )
