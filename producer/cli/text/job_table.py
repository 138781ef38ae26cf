"""The table of `batchmill jobs`: a line a job below a header, and in a narrow terminal its note on a line of its own.

There names and models are shortened, and times where that is not enough; a pipe gets everything in full.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from batchmill.jobs.store.views.jobs import Job
from batchmill.producer.views.status import duration

_HEADER = ("ID", "STATE", "AGE", "DURATION", "ANSWERED", "FAILED", "MODEL", "NAME")
#: Columns of numbers, which end at the same place.
_RIGHT = frozenset({"ANSWERED", "FAILED"})
_TIMES = ("AGE", "DURATION")
_MODEL, _NAME = _HEADER.index("MODEL"), _HEADER.index("NAME")
_GAP, _CUT = "  ", "…"
#: How far the two are shortened before times are, and how far after that.
_LEAST_AT_FIRST = {_NAME: 12, _MODEL: 12}
_LEAST = {_NAME: len("NAME"), _MODEL: len("MODEL")}

_Row = tuple[str, ...]


def table(jobs: Sequence[Job], *, notes: Mapping[str, str], now: float, width: int | None = None) -> list[str]:
    """Lines of at most `width`, where there is one, as far as what is not shortened has room in it.

    `notes`: what there is to say of jobs, by id. `now`: by the store's clock, as the times of jobs are.
    """
    rows = [_row(each, now) for each in jobs]
    said = [f"{_GAP}{note}" if (note := notes.get(each.id)) else "" for each in jobs]
    full = [(*row[:-1], row[-1] + note) for row, note in zip(rows, said, strict=True)]
    if width is None or _width(full) <= width:
        return _lines(full)
    header, *lines = _lines(_fitted(rows, width))
    return [header, *(each for pair in zip(lines, said, strict=True) for each in pair if each)]


def _fitted(rows: list[_Row], width: int) -> list[_Row]:
    fitted = _shortened(rows, width, _LEAST_AT_FIRST)
    if _width(fitted) <= width:
        return fitted
    short = [_with_short_times(each) for each in rows]
    return _shortened(_shortened(short, width, _LEAST_AT_FIRST), width, _LEAST)


def _shortened(rows: list[_Row], width: int, least: Mapping[int, int]) -> list[_Row]:
    """The rows with one column after the other shortened, down to its least, until they fit."""
    for column, few in least.items():
        if (over := _width(rows) - width) > 0:
            room = max(few, _widths(rows)[column] - over)
            rows = [(*row[:column], _cut(row[column], room, column), *row[column + 1 :]) for row in rows]
    return rows


def _cut(text: str, room: int, column: int) -> str:
    """The beginning of a name, and the end of a model, which tells it from others: its name and quantization."""
    if len(text) <= room:
        return text
    return _CUT + text[1 - room :] if column == _MODEL else text[: room - 1] + _CUT


def _with_short_times(row: _Row) -> _Row:
    """`3 min` for `3 min 20 s`."""
    cells = zip(_HEADER, row, strict=True)
    return tuple(" ".join(cell.split()[:2]) if title in _TIMES else cell for title, cell in cells)


def _widths(rows: Sequence[_Row]) -> list[int]:
    return [max(map(len, column)) for column in zip(_HEADER, *rows, strict=True)]


def _width(rows: Sequence[_Row]) -> int:
    return sum(_widths(rows)) + len(_GAP) * (len(_HEADER) - 1)


def _lines(rows: Sequence[_Row]) -> list[str]:
    widths = _widths(rows)
    return [_GAP.join(_cells(row, widths)).rstrip() for row in (_HEADER, *rows)]


def _cells(row: _Row, widths: Sequence[int]) -> list[str]:
    aligned = zip(_HEADER, row, widths, strict=True)
    return [cell.rjust(width) if title in _RIGHT else cell.ljust(width) for title, cell, width in aligned]


def _row(job: Job, now: float) -> _Row:
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
