"""The store: every query and every transaction, behind one class. No SQL stands anywhere else.

`loading` puts a prompt file into it, `saving` is a worker's turn (with what it claims), `recovery` takes leases back
and blames who was in flight, `closing` ends and cancels jobs, `retrying` opens them again; `reading` and `effort`
answer questions about jobs, `holders` tells who stands between a job and its end; `workers` keeps the workers' rows,
`health` tells a broken device from a bad prompt; `evaluations` keeps what quantization was measured to cost, `speeds`
reads how fast a machine's workers have been.
Locks are taken in one order everywhere: batches by id, then jobs by id.
"""

from __future__ import annotations

from sqlalchemy import ColumnElement, inspect, text

from jobs.errors import SchemaMismatch
from jobs.store.closing import Closing
from jobs.store.database import Database
from jobs.store.effort import EffortReading
from jobs.store.evaluations import Evaluations
from jobs.store.health import Health
from jobs.store.holders import Holders
from jobs.store.loading import Loading
from jobs.store.reading import Reading
from jobs.store.recovery import Recovery
from jobs.store.retrying import Retrying
from jobs.store.saving import Saving
from jobs.store.speeds import Speeds
from jobs.store.workers import Workers
from jobs.tables import REVISION


class Store:
    """One store, by its URL. Safe to use from several threads; each call is its own transaction."""

    def __init__(self, url: str, *, busy_seconds: float = 30.0, now: ColumnElement[float] | None = None) -> None:
        self.database = Database(url, busy_seconds=busy_seconds, now=now)
        self.closing = Closing(self.database)
        self.loading = Loading(self.database)
        self.retrying = Retrying(self.database)
        self.saving = Saving(self.database, self.closing)
        self.recovery = Recovery(self.database, self.closing)
        self.effort = EffortReading(self.database)
        self.evaluations = Evaluations(self.database)
        self.health = Health(self.database)
        self.holders = Holders(self.database)
        self.reading = Reading(self.database)
        self.speeds = Speeds(self.database)
        self.workers = Workers(self.database)

    def revision(self) -> str | None:
        """The alembic revision of its tables, None when it has none."""
        with self.database.read() as connection:
            if not inspect(connection).has_table("alembic_version"):
                return None
            return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()

    def check_revision(self) -> None:
        """Raises SchemaMismatch unless the tables are of the revision that this batchmill works with."""
        found = self.revision()
        if found != REVISION:
            state = "has no tables yet" if found is None else f"is at revision {found}"
            raise SchemaMismatch(
                f"the store {self.database.name} {state}, this batchmill works at {REVISION}: "
                "run `batchmill db upgrade`"
            )

    def close(self) -> None:
        self.database.close()
