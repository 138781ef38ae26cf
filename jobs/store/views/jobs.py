"""Answers about jobs: what was asked, how far it is, pages of outputs. Nothing here writes.

Every call is one short transaction that fetches all it needs, since an open cursor would stop SQLite's writers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, Select, and_, case, func, select

from batchmill.jobs.errors import NotFound
from batchmill.jobs.models.adapters import Adapter, from_json
from batchmill.jobs.models.spec import ModelSpec
from batchmill.jobs.requests.states import CLOSED_JOB_STATES, JobState, RequestState
from batchmill.jobs.store.bounds import octets, page_of
from batchmill.jobs.store.database.database import Database
from batchmill.jobs.store.tables import batches, jobs, outputs, requests


@dataclass(frozen=True, slots=True)
class FinishReasons:
    """Counts of the choices of a job's answers: those that ended by themselves, and those that `max_tokens` ended."""

    stop: int
    length: int


@dataclass(frozen=True, slots=True)
class Counts:
    """A job's requests by state."""

    #: The sum of all states.
    total: int
    succeeded: int
    failed: int
    cancelled: int
    prompt_tokens: int
    completion_tokens: int
    #: None where some were answered before they were counted, at revision 0007.
    finish_reasons: FinishReasons | None = None

    @property
    def pending(self) -> int:
        return self.total - self.succeeded - self.failed - self.cancelled


@dataclass(frozen=True, slots=True)
class Job:
    """One job as the store has it; times in seconds since 1970, UTC."""

    id: str
    name: str | None
    state: JobState
    #: The kind of all of its requests.
    kind: str
    spec: ModelSpec
    batch_size: int
    options: Mapping[str, Any]
    sampling: Mapping[str, Any] | None
    #: The content of its model, None until it was begun (or where that was before revision 0005).
    identity: str | None
    #: The meanings that the names it used have to it.
    adapters: tuple[Adapter, ...]
    file_name: str
    file_sha256: str
    command: str
    versions: Mapping[str, str]
    queued_at: float
    started_at: float | None
    finished_at: float | None
    counts: Counts

    @property
    def closed(self) -> bool:
        return self.state in CLOSED_JOB_STATES

    def is_of(self, identity: str | None) -> bool:
        """True where a model of this identity may answer it, as far as both are known."""
        return None in (self.identity, identity) or self.identity == identity


@dataclass(frozen=True, slots=True)
class OutputRow:
    """One request with its output, as exports need it; the three seconds of Timings are all set, or none."""

    index: int
    custom_id: str
    #: The request's JSON text.
    body: str
    state: RequestState
    payload: str
    prompt_tokens: int
    completion_tokens: int
    error_code: str | None
    error_message: str | None
    finished_at: float
    queued_seconds: float | None
    prefill_seconds: float | None
    decode_seconds: float | None


class JobView:
    """The asking side of the store."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def find(self, written: str) -> str:
        """The id of the job that a user wrote: an id, a unique beginning of one, or `last`. Raises NotFound."""
        shown = jobs.c.state != JobState.LOADING.value
        with self._database.read() as connection:
            if written == "last":
                newest = select(jobs.c.id).where(shown).order_by(jobs.c.queued_at.desc(), jobs.c.id).limit(1)
                ids = list(connection.scalars(newest).all())
            else:
                # SQLite refuses patterns of more than 50,000 bytes.
                same = jobs.c.id.startswith(written.lower()[:_LONGEST_ID], autoescape=True)
                ids = list(connection.scalars(select(jobs.c.id).where(shown, same).limit(3)).all())
        if not ids:
            if written == "last":
                raise NotFound("no job was submitted yet; `batchmill run` and `batchmill submit` make one")
            raise NotFound(f"no job begins with {written!r}; `batchmill jobs` lists them")
        if len(ids) > 1 and written not in ids:
            raise NotFound(f"several jobs begin with {written!r}: {', '.join(sorted(ids))}; write more of it")
        return written if written in ids else ids[0]

    def job(self, job_id: str) -> Job:
        """One job, by its full id. Raises NotFound."""
        matching = self._jobs(_SHOWN.where(jobs.c.id == job_id))
        if not matching:
            raise NotFound(f"there is no job {job_id}; `batchmill jobs` lists them")
        return matching[0]

    def jobs(self, *, most: int) -> list[Job]:
        """The newest jobs, newest first."""
        return self._jobs(_SHOWN.order_by(jobs.c.queued_at.desc(), jobs.c.id).limit(most))

    def now(self) -> float:
        """The time by the clock that all times of jobs are of."""
        with self._database.read() as connection:
            return float(connection.scalar(select(self._database.now)) or 0.0)

    def _jobs(self, chosen: Select[Any]) -> list[Job]:
        with self._database.read() as connection:
            rows: Sequence[Any] = connection.execute(chosen).all()
            counts = _counts(connection, [row.id for row in rows])
        return [_job(row, counts[row.id]) for row in rows]

    def resumable(self, fingerprint: str) -> list[Job]:
        """The jobs of this fingerprint that were not cancelled, newest first."""
        ended = [JobState.CANCELLING.value, JobState.CANCELLED.value]
        same = _SHOWN.where(jobs.c.fingerprint == fingerprint, jobs.c.state.not_in(ended))
        return self._jobs(same.order_by(jobs.c.queued_at.desc(), jobs.c.id))

    def output_pages(self, job_id: str, *, states: frozenset[RequestState], page: int) -> Iterator[list[OutputRow]]:
        """A job's outputs in file order, in pages of at most so many; no transaction is open between two of them."""
        same = and_(outputs.c.job_id == requests.c.job_id, outputs.c.index == requests.c.index)
        chosen = (
            select(
                outputs.c.index,
                requests.c.custom_id,
                requests.c.body,
                outputs.c.state,
                outputs.c.payload,
                outputs.c.prompt_tokens,
                outputs.c.completion_tokens,
                outputs.c.error_code,
                outputs.c.error_message,
                outputs.c.finished_at,
                outputs.c.queued_seconds,
                outputs.c.prefill_seconds,
                outputs.c.decode_seconds,
            )
            .select_from(outputs.join(requests, same))
            .where(outputs.c.job_id == job_id)
            .order_by(outputs.c.index)
            .limit(page)
        )
        if RequestState.SUCCEEDED not in states:
            chosen = chosen.where(outputs.c.state != RequestState.SUCCEEDED.value)
        size = octets(self._database, requests.c.body, outputs.c.payload)
        after = -1
        while True:
            with self._database.read() as connection:
                rows: Sequence[Any] = page_of(
                    self._database, connection, chosen.where(outputs.c.index > after), size=size
                )
            if not rows:
                return
            output_rows = [OutputRow(*row[:-1]) for row in rows]
            after = output_rows[-1].index
            yield [each for each in output_rows if each.state in states]


#: Ids are shorter than this.
_LONGEST_ID = 64
#: Jobs that are loading are shown to nobody.
_SHOWN = select(jobs).where(jobs.c.state != JobState.LOADING.value)
_SUMS = ("total", "succeeded", "failed", "cancelled", "prompt_tokens", "completion_tokens")


def _counts(connection: Connection, job_ids: list[str]) -> dict[str, Counts]:
    """A job's counts are the sums over its batches."""
    sums = [func.sum(batches.c[name]).label(name) for name in _SUMS]
    reasons = [func.coalesce(func.sum(batches.c[name]), 0).label(name) for name in ("stop_choices", "length_choices")]
    uncounted = func.sum(case((and_(batches.c.succeeded > 0, batches.c.stop_choices.is_(None)), 1), else_=0))
    rows: Sequence[Any] = connection.execute(
        select(batches.c.job_id, *sums, *reasons, uncounted.label("uncounted"))
        .where(batches.c.job_id.in_(job_ids))
        .group_by(batches.c.job_id)
    ).all()
    return {row.job_id: _of_sums(row) for row in rows}


def _of_sums(row: Row[Any]) -> Counts:
    reasons = None if row.uncounted else FinishReasons(int(row.stop_choices), int(row.length_choices))
    return Counts(**{name: int(row._mapping[name]) for name in _SUMS}, finish_reasons=reasons)


def _job(row: Row[Any], counts: Counts) -> Job:
    return Job(
        id=row.id,
        name=row.name,
        state=JobState(row.state),
        kind=row.kind,
        spec=ModelSpec.from_canonical(row.spec),
        batch_size=row.batch_size,
        options=json.loads(row.options),
        sampling=None if row.sampling is None else json.loads(row.sampling),
        identity=row.identity,
        adapters=from_json(row.adapters),
        file_name=row.file_name,
        file_sha256=row.file_sha256,
        command=row.command,
        versions=json.loads(row.versions),
        queued_at=row.queued_at,
        started_at=row.started_at,
        finished_at=row.finished_at,
        counts=counts,
    )
