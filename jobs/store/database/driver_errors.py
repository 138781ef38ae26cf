"""The errors of database drivers in words: their first line, and the remedy where one is known."""

from __future__ import annotations

import sqlite3

from sqlalchemy.exc import DBAPIError, TimeoutError


def first_line(error: BaseException) -> str:
    """The first line of an error; PostgreSQL's further lines quote the row that it is about, so prompts."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def damage(error: sqlite3.Error, name: str) -> str:
    """The line about a file that is no SQLite database, or a damaged one; empty for any other error."""
    match _sqlite_code(error):
        case sqlite3.SQLITE_NOTADB:
            return (
                f"the store {name} is no SQLite database; move the file away, or name another by BATCHMILL_HOME "
                "or BATCHMILL_DATABASE_URL"
            )
        case sqlite3.SQLITE_CORRUPT:
            return (
                f"the store {name} is damaged ({error}); stop its workers and put a backup in its place, or rescue "
                "what can be read by `sqlite3 FILE .recover | sqlite3 NEW`"
            )
    return ""


def advice(error: BaseException | None) -> str:
    """The remedy where SQLite may not open or write a file; empty for any other error."""
    if getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_READONLY_ROLLBACK:
        return ": a process died while it wrote, and what it left has to be taken back first, as `batchmill jobs` does"
    if isinstance(error, sqlite3.Error) and _sqlite_code(error) in (
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_PERM,
    ):
        return (
            "; your user has to be able to write this file, to any size, and its folder: allow it, or name another "
            "by BATCHMILL_HOME or BATCHMILL_DATABASE_URL"
        )
    return ""


def _sqlite_code(error: sqlite3.Error) -> int:
    """The primary result code, without what SQLite adds in the higher bits; 0 for an error of Python's own."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def without_rows(error: DBAPIError | TimeoutError) -> DBAPIError | TimeoutError:
    """The same error with nothing of the rows in its text."""
    if isinstance(error, TimeoutError) or error.orig is None:
        return error
    return type(error)(error.statement, None, type(error.orig)(first_line(error.orig)), hide_parameters=True)
