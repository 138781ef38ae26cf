"""The store's clock: one SQL expression, evaluated by the database as it is read; and the test for expired leases."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Float, or_
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.expression import ColumnElement


class StoreClock(ColumnElement[float]):
    """Seconds since 1970, UTC, with milliseconds; inside a transaction it goes on."""

    type = Float()
    #: It has no parts; with this declared, SQLAlchemy compiles a statement that holds it once and not each time.
    _traverse_internals = []  # noqa: RUF012
    inherit_cache = True


@compiles(StoreClock, "sqlite")
def _sqlite(_element: StoreClock, _compiler: Any, **_kwargs: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(StoreClock, "postgresql")
def _postgresql(_element: StoreClock, _compiler: Any, **_kwargs: Any) -> str:
    return "extract(epoch from clock_timestamp())::double precision"


def is_over(
    until: ColumnElement[Any], *, now: ColumnElement[float], lease_seconds: float, for_seconds: float = 0.0
) -> ColumnElement[bool]:
    """True for a lease that expired at least so long ago, or that is further ahead than one of `lease_seconds` can be.

    The latter was given before the store's clock was set back; a live worker renews it by the new time.
    """
    return or_(until < now - for_seconds, until > now + lease_seconds)
