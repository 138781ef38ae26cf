"""A crash at the first, the second and the last passing of every failpoint, on both databases.

A night without a crash counts first how often each process passes the point; its longest count is the last passing.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url

from batchmill.jobs.configuration.settings import load_settings
from batchmill.jobs.errors import BatchmillError
from batchmill.jobs.runtime.failpoints import POINTS
from batchmill.migrations.revisions import upgrade
from tests.faults.conftest import PostgresqlServer
from tests.faults.test_failpoints import Night, check
from tests.integration.conftest import TIMERS, Mill
from tests.tools.bench.table import Row, show

_AWAY_SECONDS = 4.0


@dataclass(frozen=True, slots=True)
class _Place:
    """The place of the nights: SQLite, or a PostgreSQL of the sweep's own."""

    folder: Path
    server: PostgresqlServer | None

    @property
    def name(self) -> str:
        return "postgresql" if self.server else "sqlite"

    @contextmanager
    def mill(self, number: int) -> Iterator[tuple[Mill, Path]]:
        """A new mill with an empty store, and a folder for its files."""
        folder = self.folder / f"{self.name}-{number}"
        (folder / "home").mkdir(parents=True)
        settings = load_settings(home=folder / "home", database_url=self._database(number), **TIMERS)
        upgrade(settings.database)
        mill = Mill(folder / "home", settings)
        mill.redis.start()
        try:
            yield mill, folder
        finally:
            mill.end()

    def _database(self, number: int) -> str:
        if self.server is None:
            return ""
        url = make_url(self.server.url)
        admin = create_engine(url, isolation_level="AUTOCOMMIT")
        with admin.connect() as connection:
            connection.execute(text(f"CREATE DATABASE night_{number}"))
        admin.dispose()
        return url.set(database=f"night_{number}").render_as_string(hide_password=False)


class _StoppedNight(Night):
    """A night whose store is away for a while on PostgreSQL, too."""

    server: PostgresqlServer | None = None

    def _lock_the_store(self) -> None:
        if self.server is None:
            super()._lock_the_store()
            return
        self.server.stop_immediately()
        time.sleep(_AWAY_SECONDS)
        self.server.start()


class Sweep:
    """All nights in one place."""

    def __init__(self, place: _Place) -> None:
        self._place = place
        self._nights = 0
        self.failed = 0

    def visit(self, point: str) -> Row:
        """A night for each passing of the point that is tried: the table's row."""
        most, error = self._night(point, "note@1")
        if error:
            return Row(f"{self._place.name}: {point}", f"WITHOUT A CRASH: {error}", "")
        results = [f"{self._crash(point, hit)} at {hit}" for hit in sorted({1, min(2, most), most} - {0})]
        return Row(f"{self._place.name}: {point}", ", ".join(results) or "never passed", f"of {most}")

    def _crash(self, point: str, hit: int) -> str:
        fired, error = self._night(point, f"kill9@{hit}")
        if error:
            return f"WRONG ({error})"
        return "right" if fired else "not reached"

    def _night(self, point: str, action: str) -> tuple[int, str]:
        """Passings of the process with the most of them, and what went wrong."""
        self._nights += 1
        with self._place.mill(self._nights) as (mill, folder):
            night = _StoppedNight(mill, folder, point, f"{point}={action}")
            night.server = self._place.server
            error = ""
            try:
                night.run()
                check(mill.store, night.out)
            except (AssertionError, BatchmillError, OSError) as problem:
                self.failed += 1
                error = str(problem) or type(problem).__name__
            file = mill.home / f"failpoint.{point}"
            if not file.exists():
                return 0, error
            passings = max(night.passings().values(), default=1) if action.startswith("note") else 1
            print(f"{self._place.name}: {point}={action}: {error or 'right'}", flush=True)
            return passings, error


def sweep(points: list[str] | None) -> bool:
    """Prints a table of all nights: whether every one of them was right."""
    rows: list[Row] = []
    failed = 0
    for place in _places():
        each = Sweep(place)
        rows += [each.visit(point) for point in points or POINTS]
        failed += each.failed
    show(rows)
    return not failed


def _places() -> Iterator[_Place]:
    with tempfile.TemporaryDirectory(prefix="batchmill-nights-") as folder:
        yield _Place(Path(folder), None)
        # Not in that folder: as root the server runs as another user, whom a private one keeps out.
        with tempfile.TemporaryDirectory(prefix="batchmill-nights-postgresql-") as data:
            server = PostgresqlServer(Path(data))
            try:
                yield _Place(Path(folder), server)
            finally:
                server.end()
