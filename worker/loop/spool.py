"""Outputs that wait on this machine's disk while the store is away, so that a crash meanwhile loses none of them.

A spool belongs to one child process. The child appends what it has answered and what is in flight, and empties it
once the store has all of it; when the child dies first, its parent (or a worker started later) saves it, under the
fences that held when it was written. Bounded, synced at every write; it knows no database.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from batchmill.jobs.requests.kinds import KINDS
from batchmill.jobs.requests.request import Output
from batchmill.jobs.runtime.failpoints import failpoint
from batchmill.jobs.store.leases.lease import BatchReport, Lease

#: Each line says its form. Lines of form 1 did not say it yet. In forms 1 and 2 a lease was a list of these values.
_FORMAT = 3
_LEASE_LISTED = ("batch_id", "fence", "run_id", "job_id", "apart")
_NAME = re.compile(r"(?P<store>[0-9a-f]+)-(?P<worker>[0-9]+)-(?P<generation>[0-9]+)\.jsonl")


class NewerSpool(Exception):
    """A spool that a newer batchmill wrote, which alone can read it."""


class _Written(NamedTuple):
    """The part of a batch that is in the spool."""

    #: The number of outputs.
    outputs: int
    #: The requests that are recorded as in flight.
    in_flight: tuple[int, ...]


_NOTHING = _Written(0, ())


class Spool:
    """The child's side: append and clear."""

    def __init__(self, path: Path, *, limit_bytes: int) -> None:
        self._path = path
        self._limit_bytes = limit_bytes
        self._exists = False
        self._size_bytes = 0
        #: By batch id, the part of it that is written.
        self._written: dict[int, _Written] = {}

    def append(self, reports: Sequence[BatchReport]) -> bool:
        """Writes what is new: outputs that were not yet written, and what is in flight now. False if it is full.

        The outputs of a batch only grow until `clear`. A disk without space counts as full.
        """
        now = {each.lease.batch_id: _Written(len(each.outputs), tuple(each.in_flight)) for each in reports}
        new = [each for each in reports if now[each.lease.batch_id] != self._written.get(each.lease.batch_id)]
        if not new:
            return True
        lines = [_to_line(each, self._written.get(each.lease.batch_id, _NOTHING).outputs) for each in new]
        data = "".join(lines).encode()
        if self._size_bytes + len(data) > self._limit_bytes:
            return False
        try:
            self._write(data)
        except OSError:
            self._cut_off()
            return False
        self._size_bytes += len(data)
        self._written = now
        failpoint("spool.written")
        return True

    def clear(self) -> None:
        """Forgets everything: the store has it."""
        if self._exists:
            self._path.unlink(missing_ok=True)
            self._exists, self._written, self._size_bytes = False, {}, 0

    def saved(self, reports: Sequence[BatchReport]) -> None:
        """Notes that the store has these outputs, the first of their batches, and not yet all that is written here."""
        for each in reports:
            before = self._written.get(each.lease.batch_id, _NOTHING)
            left = max(0, before.outputs - len(each.outputs))
            self._written[each.lease.batch_id] = before._replace(outputs=left)

    def _write(self, data: bytes) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._exists = True
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _cut_off(self) -> None:
        """Takes back what a write left unfinished for lack of space: half of it would say the wrong things."""
        if self._exists:
            with suppress(OSError):
                os.truncate(self._path, self._size_bytes)


@dataclass(frozen=True, slots=True)
class SpoolFile:
    """The spool of one child of a worker."""

    worker_id: int
    generation: int
    path: Path


class Spools:
    """The spools of one store in one home. They are named by the store's id, so that its URL may change."""

    def __init__(self, home: Path, store_id: str, *, database: str) -> None:
        self._folder = home / "spool"
        self._store_id = store_id
        #: batchmill 0.1.0 before revision 0006 of the store named them by its URL.
        self._older = hashlib.sha256(database.encode()).hexdigest()[:8]

    def path(self, worker_id: int, generation: int) -> Path:
        """The path of this child's spool."""
        return self._folder / f"{self._store_id}-{worker_id}-{generation}.jsonl"

    def found(self) -> list[SpoolFile]:
        """Finds all spools, the oldest child of each worker first."""
        named = ((_NAME.fullmatch(path.name), path) for path in self._folder.glob("*.jsonl"))
        ours = [
            SpoolFile(int(name["worker"]), int(name["generation"]), path)
            for name, path in named
            if name and name["store"] in (self._store_id, self._older)
        ]
        return sorted(ours, key=lambda each: (each.worker_id, each.generation))

    def left_by(self, worker_id: int, *, generation: int) -> list[SpoolFile]:
        """Finds the spools of a worker's children up to a generation, oldest first."""
        return [each for each in self.found() if each.worker_id == worker_id and each.generation <= generation]


def abandoned(home: Path, *, older_than_seconds: float) -> list[Path]:
    """Finds the spools of a home that nobody has written to for this time."""
    before = time.time() - older_than_seconds
    paths = []
    for path in (home / "spool").glob("*.jsonl"):
        with suppress(FileNotFoundError):  # its owner has just emptied it
            if path.stat().st_mtime < before:
                paths.append(path)
    return paths


def read(path: Path) -> list[BatchReport]:
    """Reads the reports of a dead child, one for each batch it held; a line that the crash cut off is left out.

    Raises NewerSpool.
    """
    outputs: dict[Lease, list[Output]] = {}
    in_flight: dict[Lease, list[int]] = {}
    for line in _lines(path):
        if line.get("format", 1) > _FORMAT:
            raise NewerSpool
        lease = _lease(line["lease"])
        kind = KINDS.get(lease.kind)
        if kind is None:
            raise NewerSpool
        outputs.setdefault(lease, []).extend(Output.from_json(each, kind) for each in line["outputs"])
        in_flight[lease] = line["in_flight"]
    return [BatchReport(lease, outputs=outputs[lease], in_flight=in_flight[lease]) for lease in outputs]


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        for line in file:
            try:
                yield json.loads(line)
            except ValueError:
                return


def _lease(written: dict[str, Any] | list[Any]) -> Lease:
    """The lease of a line of any form."""
    return Lease(**(dict(zip(_LEASE_LISTED, written, strict=True)) if isinstance(written, list) else written))


def _to_line(report: BatchReport, written: int) -> str:
    line = {
        "format": _FORMAT,
        "lease": asdict(report.lease),
        "in_flight": list(report.in_flight),
        "outputs": [each.to_json() for each in report.outputs[written:]],
    }
    return json.dumps(line, separators=(",", ":")) + "\n"
