"""Store: every query and every transaction, behind one class.

`jobs` has the transactions that begin, end and reopen jobs; `leases` those of workers (claim, sync) and of the
reconciler (recovery, blame, health); `workers` the rows that workers write about themselves; `views` answers
questions. Beside them, `checking` checks the whole store, and `own_id` tells this store from every other.
Locks are taken in one order everywhere: batches by id, then jobs by id.
"""

from __future__ import annotations

import re
from functools import cached_property
from typing import TYPE_CHECKING

from sqlalchemy import ColumnElement, inspect, text

from batchmill.jobs.errors import SchemaMismatch, StoreError
from batchmill.jobs.store.database.database import Database
from batchmill.jobs.store.jobs.close import Closing
from batchmill.jobs.store.jobs.create import Creation
from batchmill.jobs.store.jobs.retry import Retries
from batchmill.jobs.store.leases.health import Health
from batchmill.jobs.store.leases.recovery import Recovery
from batchmill.jobs.store.leases.sync import Leases
from batchmill.jobs.store.own_id import OwnId
from batchmill.jobs.store.tables import REVISION, metadata
from batchmill.jobs.store.views.blockers import Blockers
from batchmill.jobs.store.views.evaluations import Evaluations
from batchmill.jobs.store.views.jobs import JobView
from batchmill.jobs.store.views.measured_speeds import SpeedView
from batchmill.jobs.store.views.sample import SampleView
from batchmill.jobs.store.views.usage import UsageView
from batchmill.jobs.store.views.workers import WorkerView
from batchmill.jobs.store.workers.registration import Registration

if TYPE_CHECKING:
    from batchmill.jobs.store.checking import Checking

_REVISION = re.compile(r"[0-9]{4}")
_MOST_NAMES = 5


class Store:
    """One store, by its URL. Safe to use from several threads; each call is its own transaction."""

    def __init__(
        self,
        url: str,
        *,
        busy_seconds: float = 30.0,
        now: ColumnElement[float] | None = None,
        read_only: bool = False,
    ) -> None:
        self.database = Database(url, busy_seconds=busy_seconds, now=now, read_only=read_only)
        self.closing = Closing(self.database)
        self.creation = Creation(self.database)
        self.retries = Retries(self.database)
        self.leases = Leases(self.database, self.closing)
        self.recovery = Recovery(self.database, self.closing)
        self.usage = UsageView(self.database)
        self.evaluations = Evaluations(self.database)
        self.health = Health(self.database)
        self.blockers = Blockers(self.database)
        self.own_id = OwnId(self.database)
        self.jobs = JobView(self.database)
        self.samples = SampleView(self.database)
        self.speeds = SpeedView(self.database)
        self.workers = WorkerView(self.database)
        self.registration = Registration(self.database)

    @cached_property
    def checking(self) -> Checking:
        from batchmill.jobs.store.checking import Checking  # here, since it builds all its questions as it is imported

        return Checking(self.database)

    @property
    def id(self) -> str:
        """The id that tells this store from every other. Raises StoreError."""
        return self.own_id.get()

    def revision(self) -> str | None:
        """The alembic revision of its tables, None when it has none. Raises StoreError for those of another program."""
        if self.database.is_absent:
            return None
        with self.database.read() as connection:
            tables = set(inspect(connection).get_table_names())
            revision = None
            if "alembic_version" in tables:
                revision = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
        # Others may have tables in a PostgreSQL database, under other names; a file is one program's.
        foreign = tables if self.database.is_sqlite else tables & metadata.tables.keys()
        if (revision is None and foreign - {"alembic_version"}) or (revision and not _REVISION.fullmatch(revision)):
            names = ", ".join(sorted(foreign)[:_MOST_NAMES])
            raise StoreError(
                f"{self.database.name} holds the tables of another program ({names}), and no store of batchmill; "
                "name another by BATCHMILL_HOME or BATCHMILL_DATABASE_URL"
            )
        return revision

    def check_revision(self) -> None:
        """Raises SchemaMismatch unless the tables are of the revision that this batchmill works with."""
        revision = self.revision()
        if revision != REVISION:
            state = "has no tables yet" if revision is None else f"is at revision {revision}"
            raise SchemaMismatch(
                f"the store {self.database.name} {state}, this batchmill works at {REVISION}: "
                "run `batchmill db upgrade`"
            )

    def close(self) -> None:
        self.database.close()
