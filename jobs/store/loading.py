"""Putting a prompt file into the store, in short transactions that nobody sees until the last one.

A loading job has a lease of its own; only who renews it may add to the job or open it. What a killed submit
left behind is deleted by others, in pages, once that lease has expired.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, delete, insert, select, update
from sqlalchemy.exc import IntegrityError

from jobs.errors import KeyTaken, LoadingLost
from jobs.schema import JobOptions, Provenance, Request, new_job_id
from jobs.spec import ModelSpec
from jobs.states import JOB_BEFORE, BatchState, JobState
from jobs.store.database import Database
from jobs.store.moving import new_batches
from jobs.store.pending import NO_ADAPTER
from jobs.tables import batches, jobs, requests

#: A loading transaction holds at most this many requests, or this many bytes of them: a tenth of a second or two.
MAX_REQUESTS = 10_000
MAX_BYTES = 8 * 1024 * 1024
#: How many rows one transaction deletes.
_PAGE = 5_000
#: How many values one query compares with.
_SLICE = 500


@dataclass(frozen=True, slots=True)
class Duplicate:
    """A request whose custom_id another one of its job already has; both by their index."""

    index: int
    custom_id: str
    first_index: int


class Loading:
    """The submit's side of the store."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def begin(
        self,
        *,
        name: str | None,
        options: JobOptions,
        batch_size: int,
        provenance: Provenance,
        lease_seconds: float,
    ) -> str:
        """A new job in the state `loading`: its id. The file's hash is known when it is opened."""
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

        They are gathered into batches of `batch_size` that name one adapter, or none.
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

    def renew(self, job_id: str, *, lease_seconds: float) -> None:
        """Renews the lease of a loading job; raises LoadingLost."""
        with self._database.write() as connection:
            self._hold(connection, job_id, lease_seconds)

    def open(
        self,
        job_id: str,
        *,
        spec: ModelSpec,
        file_sha256: str,
        fingerprint: str,
        lease_seconds: float,
        idempotency_key: str | None = None,
    ) -> None:
        """Flips the job to `queued`: from now on it is seen and claimed.

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
        with self._database.write() as connection:  # from here on nothing can be added, nor the job opened
            expired = connection.execute(
                update(jobs)
                .where(jobs.c.id == job_id, jobs.c.state == JobState.LOADING.value)
                .values(loading_until=0.0)
            )
        if expired.rowcount:
            self._delete(job_id)

    def discard_expired(self) -> list[str]:
        """Deletes loading jobs whose lease has expired: their ids."""
        with self._database.read() as connection:
            expired = connection.scalars(
                select(jobs.c.id).where(
                    jobs.c.state == JobState.LOADING.value, jobs.c.loading_until < self._database.now
                )
            ).all()
        for job_id in expired:
            self._delete(job_id)
        return list(expired)

    def _hold(self, connection: Connection, job_id: str, lease_seconds: float) -> None:
        now = self._database.now
        held = connection.execute(
            update(jobs)
            .where(jobs.c.id == job_id, jobs.c.state == JobState.LOADING.value, jobs.c.loading_until >= now)
            .values(loading_until=now + lease_seconds)
        )
        if held.rowcount != 1:
            raise LoadingLost(
                f"job {job_id} was not loaded: its lease expired while the file was read; submit it again"
            )

    def _add(self, job_id: str, prompts: Sequence[Request], batch_size: int, lease_seconds: float) -> None:
        named = [each.adapter or NO_ADAPTER for each in prompts]
        rows: list[dict[str, object]] = [
            {"job_id": job_id, "index": each.index, "custom_id": each.custom_id, "body": each.to_body()}
            for each in prompts
        ]
        with self._database.write() as connection:
            self._hold(connection, job_id, lease_seconds)
            if not rows:
                return
            # One open batch for each adapter and one for none: what stands together in the file may be apart here.
            places = {
                adapter: iter(self._place(connection, job_id, adapter, count, batch_size))
                for adapter, count in sorted(Counter(named).items())
            }
            for row, adapter in zip(rows, named, strict=True):
                row["batch_id"] = next(places[adapter])
            connection.execute(insert(requests), rows)

    def _place(self, connection: Connection, job_id: str, adapter: str, count: int, batch_size: int) -> list[int]:
        """Fills the job's last batch of an adapter up and makes new ones: the batch id of each of `count` requests."""
        last = connection.execute(
            select(batches.c.id, batches.c.total)
            .where(batches.c.job_id == job_id, batches.c.state == BatchState.PENDING.value)
            .where(batches.c.adapter == adapter)
            .order_by(batches.c.id.desc())
            .limit(1)
        ).first()
        placed: list[int] = []
        if last is not None and last.total < batch_size:
            room = min(batch_size - last.total, count)
            connection.execute(update(batches).where(batches.c.id == last.id).values(total=batches.c.total + room))
            placed += [last.id] * room
        sizes = [min(batch_size, count - begin) for begin in range(len(placed), count, batch_size)]
        for batch_id, size in zip(new_batches(connection, job_id, sizes, adapter=adapter), sizes, strict=True):
            placed += [batch_id] * size
        return placed

    def _duplicates(self, job_id: str, prompts: Sequence[Request]) -> list[Duplicate]:
        first: dict[str, int] = {}
        with self._database.read() as connection:
            for begin in range(0, len(prompts), _SLICE):
                ids = [each.custom_id for each in prompts[begin : begin + _SLICE]]
                found = connection.execute(
                    select(requests.c.custom_id, requests.c.index).where(
                        requests.c.job_id == job_id, requests.c.custom_id.in_(ids)
                    )
                )
                first.update(dict(found.all()))
        duplicates = []
        for each in prompts:
            seen = first.setdefault(each.custom_id, each.index)
            if seen != each.index:
                duplicates.append(Duplicate(each.index, each.custom_id, seen))
        return duplicates

    def _delete(self, job_id: str) -> None:
        page = select(requests.c.index).where(requests.c.job_id == job_id).limit(_PAGE).scalar_subquery()
        of_page = delete(requests).where(requests.c.job_id == job_id, requests.c.index.in_(page))
        deleted = _PAGE
        while deleted:
            with self._database.write() as connection:
                deleted = connection.execute(of_page).rowcount
        with self._database.write() as connection:
            connection.execute(delete(batches).where(batches.c.job_id == job_id))
            connection.execute(delete(jobs).where(jobs.c.id == job_id))
