"""The store's own id: random, made with its tables and kept in them, whatever the URL says that leads to them.

Spools and queues are named by it. A copy of a store has it too, until it is given one of its own.
"""

from __future__ import annotations

import uuid

from sqlalchemy import insert, select, update

from batchmill.jobs.errors import StoreError, UsageError
from batchmill.jobs.store.database.conflicts import retried
from batchmill.jobs.store.database.database import Database
from batchmill.jobs.store.tables import stores, workers
from batchmill.jobs.store.workers.liveness import alive

_PLACE = 1


class OwnId:
    """The id, read once and kept for as long as this object is."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._known: str | None = None

    def get(self) -> str:
        """The id. Raises StoreError where the store has lost it."""
        if self._known is None:
            with self._database.read() as connection:
                store_id = connection.scalar(select(stores.c.id))
            if store_id is None:
                raise StoreError(f"the store {self._database.name} has lost its id: `batchmill db new-id` makes one")
            self._known = str(store_id)
        return self._known

    @retried
    def renew(self) -> str:
        """Gives the store a new id and returns it. Raises UsageError while a worker lives, which has the old one."""
        new = uuid.uuid4().hex
        with self._database.write() as connection:
            live = connection.execute(select(workers.c.name, workers.c.host).where(alive(self._database.now))).first()
            if live is not None:
                raise UsageError(
                    f"worker {live.name} on {live.host} is alive, or was a moment ago, and has the old id: stop the "
                    "workers of this store first; of a copy that was just made, wait half a minute"
                )
            changed = connection.execute(update(stores).values(id=new)).rowcount
            if not changed:
                connection.execute(insert(stores).values(place=_PLACE, id=new))
        self._known = new
        return new
