"""The table of `batchmill jobs`: a line a job below a header."""

from __future__ import annotations

from collections.abc import Sequence

from jobs.store.reading import Job
from producer.status import duration

_HEADER = ("ID", "STATE", "AGE", "DURATION", "ANSWERED", "FAILED", "MODEL", "NAME")
#: Columns of numbers, which end at the same place.
_RIGHT = frozenset({"ANSWERED", "FAILED"})


def table(jobs: Sequence[Job], *, now: float) -> list[str]:
    """`now`: by the store's clock, of which the times of jobs are."""
    rows = [_HEADER, *(_row(each, now) for each in jobs)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(_cells(row, widths)).rstrip() for row in rows]


def _cells(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    aligned = zip(_HEADER, row, widths, strict=True)
    return [cell.rjust(width) if title in _RIGHT else cell.ljust(width) for title, cell, width in aligned]


def _row(job: Job, now: float) -> tuple[str, ...]:
    counts = job.counts
    return (
        job.id,
        job.state.value,
        duration(max(0.0, now - job.queued_at)),
        "-" if job.started_at is None else duration(max(0.0, (job.finished_at or now) - job.started_at)),
        f"{counts.succeeded:,}/{counts.total:,}",
        f"{counts.failed:,}",
        str(job.spec),
        job.name or job.file_name,
    )
