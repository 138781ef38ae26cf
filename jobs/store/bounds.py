"""Bounds of one transaction: so many rows, or so many bytes of prompts and answers, whichever comes first.

One row is always taken, however long it is. It knows neither tables nor the purpose of the rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from operator import add
from typing import Any

from sqlalchemy import ColumnElement, Connection, LargeBinary, Row, Select, cast, func, or_, select

from batchmill.jobs.store.database.database import Database

#: The most bytes of a batch, and of what one transaction reads or writes: a tenth of a second or two.
PAGE_BYTES = 8 * 1024 * 1024


def cut(sizes: Iterable[int], *, most: int, filled: tuple[int, int] = (0, 0)) -> list[int]:
    """Splits rows of these sizes, in order, into parts that each fit a batch or a page: the number of rows in each.

    `filled`: the rows and bytes that the first part has already, so that nothing may go into it.
    """
    parts = [0]
    count, total = filled
    for size in sizes:
        if count and (count >= most or total + size > PAGE_BYTES):
            parts.append(0)
            count = total = 0
        parts[-1] += 1
        count += 1
        total += size
    return parts


def text_bytes(text: str) -> int:
    """The bytes of a text in UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


def octets(database: Database, *texts: ColumnElement[str]) -> ColumnElement[int]:
    """The bytes of these texts of one row, as the database counts them."""
    sizes = [func.length(cast(each, LargeBinary)) if database.is_sqlite else func.octet_length(each) for each in texts]
    return reduce(add, sizes)


def page_of(
    database: Database, connection: Connection, chosen: Select[Any], *, size: ColumnElement[int]
) -> list[Row[Any]]:
    """The first page of a query's rows, each with its `size` behind; the query is ordered by its first column.

    SQLite finds rows one by one, and the rest is never read; PostgreSQL counts bytes without reading long texts.
    """
    chosen = chosen.add_columns(size.label("size_bytes"))
    if not database.is_sqlite:
        rows = chosen.subquery()
        so_far = func.sum(rows.c.size_bytes).over(order_by=rows.c[0], rows=(None, 0))
        counted = select(rows, so_far.label("so_far")).subquery()
        page = or_(counted.c.so_far <= PAGE_BYTES, counted.c.so_far == counted.c.size_bytes)
        return list(connection.execute(select(*counted.c[:-1]).where(page).order_by(counted.c[0])).all())
    taken: list[Row[Any]] = []
    total = 0
    with connection.execute(chosen) as result:
        for row in result:
            total += row.size_bytes
            if taken and total > PAGE_BYTES:
                break
            taken.append(row)
    return taken
