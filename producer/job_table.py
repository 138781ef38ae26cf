"""The table of `batchmill jobs`: a line a job below a header."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jobs.store.reading import Job
from producer.status import duration

_HEADER = ("ID", "STATE", "AGE", "DURATION", "ANSWERED", "FAILED", "MODEL", "NAME")
#: Columns of numbers, which end at the same place.
_RIGHT = frozenset({"ANSWERED", "FAILED"})


def table(jobs: Sequence[Job], *, ends: Mapping[str, str], now: float) -> list[str]:
    """`ends`: when jobs end, by id, where that is known. `now`: by the store's clock, as the times of jobs are."""
    rows = [_HEADER, *(_row(each, ends.get(each.id), now) for each in jobs)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(_cells(row, widths)).rstrip() for row in rows]


def _cells(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    aligned = zip(_HEADER, row, widths, strict=True)
    return [cell.rjust(width) if title in _RIGHT else cell.ljust(width) for title, cell, width in aligned]


def _row(job: Job, ends: str | None, now: float) -> tuple[str, ...]:
    counts = job.counts
    name = job.name or job.file_name
    return (
        job.id,
        job.state.value,
        duration(max(0.0, now - job.queued_at)),
        "-" if job.started_at is None else duration(max(0.0, (job.finished_at or now) - job.started_at)),
        f"{counts.succeeded:,}/{counts.total:,}",
        f"{counts.failed:,}",
        str(job.spec),
        name if ends is None else f"{name}  ends in {ends}",
    )
