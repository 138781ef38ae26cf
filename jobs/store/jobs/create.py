"""The creation of a job from a prompt file, in short transactions that nobody sees until the last one.

A loading job has a lease of its own; only the submit that renews it may add to the job or open it. Reconcilers delete
what a killed submit left behind, in pages, once that lease has expired; until they begin it can still be renewed.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, and_, delete, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from batchmill.jobs.errors import KeyTaken, LoadingLost
from batchmill.jobs.models.spec import ModelSpec
from batchmill.jobs.requests.ids import new_job_id
from batchmill.jobs.requests.request import FIRST_KIND, JobOptions, Provenance, Request
from batchmill.jobs.requests.states import JOB_BEFORE, BatchState, JobState
from batchmill.jobs.store.bounds import cut, octets, page_of, text_bytes
from batchmill.jobs.store.database.clock import is_over
from batchmill.jobs.store.database.conflicts import retried
from batchmill.jobs.store.database.database import Database
from batchmill.jobs.store.jobs.rebatch import new_batches
from batchmill.jobs.store.tables import NO_ADAPTER, batches, jobs, requests

#: A loading transaction holds at most this many requests, beside the bound of its bytes: others write too.
MAX_REQUESTS = 4_000
#: Rows that one transaction deletes.
_PAGE = 5_000
#: Values that one query compares with.
_SLICE = 500
#: The lease of a loading job that is being deleted; it cannot be renewed.
_DISCARDED = 0.0


@dataclass(frozen=True, slots=True)
class Duplicate:
    """A request whose custom_id another one of its job already has; both by their index."""

    index: int
    custom_id: str
    first_index: int


class Creation:
    """The submit's side of the store."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @retried
    def begin(
        self,
        *,
        name: str | None,
        options: JobOptions,
        batch_size: int,
        provenance: Provenance,
        lease_seconds: float,
    ) -> str:
        """Makes a job in the state `loading` and returns its id. The file's hash is known when it is opened."""
        job_id = new_job_id()
        now = self._database.now
        with self._database.write() as connection:
            connection.execute(
                insert(jobs).values(
                    id=job_id,
                    name=name,
                    state=JobState.LOADING.value,
                    batch_size=batch_size,
                    options=json.dumps(options.to_json()),
                    file_name=provenance.file_name,
                    command=provenance.command,
                    versions=json.dumps(dict(provenance.versions)),
                    created_at=now,
                    loading_until=now + lease_seconds,
                )
            )
        return job_id

    def add(self, job_id: str, *, prompts: Sequence[Request], batch_size: int, lease_seconds: float) -> list[Duplicate]:
        """Adds requests whose indexes go on where the last call ended; renews the lease.

        They are gathered into batches of at most `batch_size` that name one adapter, or none.
        Requests with a custom_id that the job already has are left out and returned.
        Raises LoadingLost when the lease was lost.
        """
        try:
            self._add(job_id, prompts, batch_size, lease_seconds)
        except IntegrityError:
            duplicates = self._duplicates(job_id, prompts)
            bad = {each.index for each in duplicates}
            self._add(job_id, [each for each in prompts if each.index not in bad], batch_size, lease_seconds)
            return duplicates
        return []

    @retried
    def renew(self, job_id: str, *, lease_seconds: float) -> None:
        """Renews the lease of a loading job; raises LoadingLost."""
        with self._database.write() as connection:
            self._hold(connection, job_id, lease_seconds)

    @retried
    def open(
        self,
        job_id: str,
        *,
        spec: ModelSpec,
        file_sha256: str,
        fingerprint: str,
        lease_seconds: float,
        idempotency_key: str | None = None,
        kind: str = FIRST_KIND,
    ) -> None:
        """Flips the job to `queued`: from now on it is seen and claimed. `kind`: of all of its requests.

        Of all jobs one alone is opened under a key. Raises LoadingLost, KeyTaken.
        """
        values = {
            "state": JobState.QUEUED.value,
            "spec": spec.canonical,
            "model": spec.model,
            "revision": spec.revision,
            "quantization": spec.quantization.canonical,
            "file_sha256": file_sha256,
            "fingerprint": fingerprint,
            "idempotency_key": idempotency_key,
            "kind": kind,
            "queued_at": self._database.now,
            "loading_until": None,
        }
        same = (jobs.c.id == job_id, jobs.c.state.in_(JOB_BEFORE[JobState.QUEUED]))
        try:
            with self._database.write() as connection:
                self._hold(connection, job_id, lease_seconds)
                connection.execute(update(jobs).where(*same).values(values))
        except IntegrityError:
            if idempotency_key is not None:
                self.refuse_taken(idempotency_key, fingerprint=fingerprint)
            raise

    def refuse_taken(self, idempotency_key: str, *, fingerprint: str) -> None:
        """Raises KeyTaken if a job was opened under this key."""
        with self._database.read() as connection:
            holder = connection.execute(
                select(jobs.c.id, jobs.c.fingerprint).where(jobs.c.idempotency_key == idempotency_key)
            ).first()
        if holder is None:
            return
        is_same = holder.fingerprint == fingerprint
        other = "" if is_same else " with another file, model or options; choose another key"
        raise KeyTaken(
            f"job {holder.id} was submitted under the key {idempotency_key!r}{other}",
            job_id=holder.id,
            is_same=is_same,
        )

    def discard(self, job_id: str) -> None:
        """Deletes a job that is loading, with all its rows, in pages; any other is left alone."""
        self._discard(jobs.c.id == job_id)

    def expired(self, *, lease_seconds: float) -> dict[str, float]:
        """Loading jobs whose lease is over, as `is_over` has it: {job id: loading_until}."""
        over = is_over(jobs.c.loading_until, now=self._database.now, lease_seconds=lease_seconds)
        with self._database.read() as connection:
            rows = connection.execute(
                select(jobs.c.id, jobs.c.loading_until).where(jobs.c.state == JobState.LOADING.value, over)
            ).all()
        return {row.id: row.loading_until for row in rows}

    def discard_expired(self, leases: Mapping[str, float]) -> list[str]:
        """Deletes these loading jobs, as `expired` gave them, unless their lease was renewed; returns their ids."""
        return [
            job_id
            for job_id, until in sorted(leases.items())
            if self._discard(and_(jobs.c.id == job_id, jobs.c.loading_until == until))
        ]

    def _discard(self, which: ColumnElement[bool]) -> bool:
        job_id = self._mark_discarded(which)
        if job_id is not None:
            self._delete(job_id)
        return job_id is not None

    @retried
    def _mark_discarded(self, which: ColumnElement[bool]) -> str | None:
        """Keeps this loading job from being added to or opened, and returns its id."""
        with self._database.write() as connection:
            job_id: str | None = connection.scalar(
                update(jobs)
                .where(which, jobs.c.state == JobState.LOADING.value)
                .values(loading_until=_DISCARDED)
                .returning(jobs.c.id)
            )
        return job_id

    def _hold(self, connection: Connection, job_id: str, lease_seconds: float) -> None:
        now = self._database.now
        held = connection.execute(
            update(jobs)
            .where(jobs.c.id == job_id, jobs.c.state == JobState.LOADING.value, jobs.c.loading_until > _DISCARDED)
            .values(loading_until=now + lease_seconds)
        )
        if held.rowcount != 1:
            raise LoadingLost(
                f"job {job_id} was not loaded: its lease expired while the file was read; submit it again"
            )

    @retried
    def _add(self, job_id: str, prompts: Sequence[Request], batch_size: int, lease_seconds: float) -> None:
        named = [each.adapter or NO_ADAPTER for each in prompts]
        rows: list[dict[str, Any]] = [
            {"job_id": job_id, "index": each.index, "custom_id": each.custom_id, "body": each.to_body()}
            for each in prompts
        ]
        with self._database.write() as connection:
            self._hold(connection, job_id, lease_seconds)
            if not rows:
                return
            # One open batch for each adapter and one for none: what stands together in the file may be apart here.
            sizes: defaultdict[str, list[int]] = defaultdict(list)
            for row, adapter in zip(rows, named, strict=True):
                sizes[adapter].append(text_bytes(row["body"]))
            places = {
                adapter: iter(self._place(connection, job_id, adapter, each, batch_size))
                for adapter, each in sorted(sizes.items())
            }
            for row, adapter in zip(rows, named, strict=True):
                row["batch_id"] = next(places[adapter])
            connection.execute(insert(requests), rows)

    def _place(
        self, connection: Connection, job_id: str, adapter: str, sizes: Sequence[int], batch_size: int
    ) -> list[int]:
        """Fills the job's last batch of an adapter up and makes new ones; returns the batch id of each request."""
        last = connection.execute(
            select(batches.c.id, batches.c.total)
            .where(batches.c.job_id == job_id, batches.c.state == BatchState.PENDING.value)
            .where(batches.c.adapter == adapter)
            .order_by(batches.c.id.desc())
            .limit(1)
        ).first()
        placed: list[int] = []
        filled = (0, 0) if last is None else (last.total, self._body_bytes(connection, last.id))
        counts = cut(sizes, most=batch_size, filled=filled)
        if last is not None and (count := counts.pop(0)):
            connection.execute(update(batches).where(batches.c.id == last.id).values(total=batches.c.total + count))
            placed += [last.id] * count
        for batch_id, count in zip(new_batches(connection, job_id, counts, adapter=adapter), counts, strict=True):
            placed += [batch_id] * count
        return placed

    def _body_bytes(self, connection: Connection, batch_id: int) -> int:
        bodies = select(func.sum(octets(self._database, requests.c.body))).where(requests.c.batch_id == batch_id)
        return int(connection.execute(bodies).scalar_one() or 0)

    def _duplicates(self, job_id: str, prompts: Sequence[Request]) -> list[Duplicate]:
        first: dict[str, int] = {}
        with self._database.read() as connection:
            for begin in range(0, len(prompts), _SLICE):
                ids = [each.custom_id for each in prompts[begin : begin + _SLICE]]
                rows = connection.execute(
                    select(requests.c.custom_id, requests.c.index).where(
                        requests.c.job_id == job_id, requests.c.custom_id.in_(ids)
                    )
                )
                first.update(dict(rows.all()))
        duplicates = []
        for each in prompts:
            seen = first.setdefault(each.custom_id, each.index)
            if seen != each.index:
                duplicates.append(Duplicate(each.index, each.custom_id, seen))
        return duplicates

    @retried
    def _delete(self, job_id: str) -> None:
        of_job = select(requests.c.index).where(requests.c.job_id == job_id).order_by(requests.c.index).limit(_PAGE)
        size = octets(self._database, requests.c.body)
        more = True
        while more:
            with self._database.write() as connection:
                page = page_of(self._database, connection, of_job, size=size)
                last = page[-1][0] if page else -1
                connection.execute(delete(requests).where(requests.c.job_id == job_id, requests.c.index <= last))
                more = bool(page)
        some = select(batches.c.id).where(batches.c.job_id == job_id).order_by(batches.c.id).limit(_PAGE)
        more = True
        while more:
            with self._database.write() as connection:
                more = connection.execute(delete(batches).where(batches.c.id.in_(some.scalar_subquery()))).rowcount > 0
        with self._database.write() as connection:
            connection.execute(delete(jobs).where(jobs.c.id == job_id))
