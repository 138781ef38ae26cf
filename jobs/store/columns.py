"""Parts of which the tables are made: types of columns, checks of states and partial indexes."""

from __future__ import annotations

from sqlalchemy import BigInteger, CheckConstraint, Column, Index, Integer, text

#: The type of ids: SQLite numbers rows by itself only in a column declared INTEGER.
Id = BigInteger().with_variant(Integer, "sqlite")
STATE_LENGTH = 16


def one_of(column: str, values: type) -> CheckConstraint:
    """The check that a column holds a value of an enum."""
    names = ", ".join(f"'{each.value}'" for each in values)  # type: ignore[attr-defined]
    return CheckConstraint(f"{column} IN ({names})", name=column)


def partial_index(name: str, *columns: str, where: str) -> Index:
    """An index of the rows `where` alone; its migration spells that for each database.

    Arguments of a dialect would import it here, PostgreSQL's for a command that reads SQLite.
    """
    return Index(name, *columns, info={"where": where})


def count_column(name: str) -> Column[int]:
    """A column of counts, or bytes, from 0."""
    return Column(name, BigInteger, nullable=False, server_default=text("0"))
