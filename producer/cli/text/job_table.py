"""The table of `batchmill jobs`: a line a job below a header, and in a narrow terminal its note below it.

There, names and models are shortened, then times; where that is not enough, columns are left out. A pipe gets
everything in full.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from textwrap import wrap

from batchmill.jobs.runtime.times import duration
from batchmill.jobs.store.views.jobs import Job

_HEADER = ("ID", "STATE", "AGE", "DURATION", "ANSWERED", "FAILED", "MODEL", "NAME")
#: Columns of numbers, which end at the same place.
_RIGHT = frozenset({"ANSWERED", "FAILED"})
_TIMES = ("AGE", "DURATION")
_GAP, _CUT = "  ", "…"
#: The least widths of the two before times are shortened, and after that.
_LEAST_AT_FIRST = {"NAME": 12, "MODEL": 12}
_LEAST = {"NAME": len("NAME"), "MODEL": len("MODEL")}
#: Columns that are left out, one after the other: the rest tells which job it is, and how far.
_NEEDED_LEAST = ("AGE", "DURATION", "MODEL", "NAME", "FAILED")

#: Cells by the titles of their columns, in order.
_Row = Mapping[str, str]


def table(jobs: Sequence[Job], *, notes: Mapping[str, str], now: float, width: int | None = None) -> list[str]:
    """The lines of the table, of at most `width` where there is one and what cannot be shortened has room in it.

    `notes`: a note on some jobs, by id. `now`: by the store's clock, as the times of jobs are.
    """
    header = dict(zip(_HEADER, _HEADER, strict=True))
    rows = [header, *(_row(each, now) for each in jobs)]
    row_notes = ["", *(notes.get(each.id, "") for each in jobs)]
    full = [
        {**row, "NAME": _GAP.join(filter(None, (row["NAME"], note)))} for row, note in zip(rows, row_notes, strict=True)
    ]
    if width is None or _width(full) <= width:
        return list(_lines(full))
    lines = zip(_lines(_fitted(rows, width)), row_notes, strict=True)
    return [each for line, note in lines for each in (line, *_below(note, width))]


def _below(note: str, width: int) -> list[str]:
    """A note in lines of its own, of whole words."""
    least = len(_GAP) + 1
    return wrap(note, max(width, least), initial_indent=_GAP, subsequent_indent=_GAP, break_long_words=False)


def _fitted(rows: Sequence[_Row], width: int) -> Sequence[_Row]:
    fitted = _narrowed(rows, width)
    for title in _NEEDED_LEAST:
        if _width(fitted) <= width:
            break
        rows = [{other: cell for other, cell in row.items() if other != title} for row in rows]
        fitted = _narrowed(rows, width)
    return fitted


def _narrowed(rows: Sequence[_Row], width: int) -> Sequence[_Row]:
    """The rows with all their columns, and no longer than they have to be."""
    narrowed = _shortened(rows, width, _LEAST_AT_FIRST)
    if _width(narrowed) <= width:
        return narrowed
    short = [_with_short_times(each) for each in rows]
    return _shortened(_shortened(short, width, _LEAST_AT_FIRST), width, _LEAST)


def _shortened(rows: Sequence[_Row], width: int, least: Mapping[str, int]) -> Sequence[_Row]:
    """The rows with one column after the other shortened, down to its least, until they fit."""
    for title, few in least.items():
        if title in rows[0] and (over := _width(rows) - width) > 0:
            room = max(few, _widths(rows)[title] - over)
            rows = [{**row, title: _cut(row[title], room, title)} for row in rows]
    return rows


def _cut(text: str, room: int, title: str) -> str:
    """The beginning of a name, and the end of a model, which tells it from others: its name and quantization."""
    if len(text) <= room:
        return text
    return _CUT + text[1 - room :] if title == "MODEL" else text[: room - 1] + _CUT


def _with_short_times(row: _Row) -> _Row:
    """`3 min` for `3 min 20 s`."""
    return {title: " ".join(cell.split()[:2]) if title in _TIMES else cell for title, cell in row.items()}


def _widths(rows: Sequence[_Row]) -> dict[str, int]:
    return {title: max(len(row[title]) for row in rows) for title in rows[0]}


def _width(rows: Sequence[_Row]) -> int:
    widths = _widths(rows).values()
    return sum(widths) + len(_GAP) * (len(widths) - 1)


def _lines(rows: Sequence[_Row]) -> Iterator[str]:
    widths = _widths(rows)
    for row in rows:
        cells = (cell.rjust(widths[each]) if each in _RIGHT else cell.ljust(widths[each]) for each, cell in row.items())
        yield _GAP.join(cells).rstrip()


def _row(job: Job, now: float) -> _Row:
    counts = job.counts
    cells = (
        job.id,
        job.state.value,
        duration(max(0.0, now - job.queued_at)),
        "-" if job.started_at is None else duration(max(0.0, (job.finished_at or now) - job.started_at)),
        f"{counts.succeeded:,}/{counts.total:,}",
        f"{counts.failed:,}",
        str(job.spec),
        job.name or job.file_name,
    )
    return dict(zip(_HEADER, cells, strict=True))
