"""Two live stores that show one id, as a store and its restored copy do: told by a mark in the Redis that they share.

Every worker leaves its mark under the store's id. A worker that finds, in the place of its own, the mark of a worker
that its store does not know has met another store: the mark was written after its own, so that other store lives.
"""

from __future__ import annotations

import json
from typing import Any

from batchmill.jobs.broker.client import Broker
from batchmill.jobs.errors import BrokerUnavailable
from batchmill.jobs.runtime.logs import get_logger
from batchmill.jobs.runtime.process.process import Process
from batchmill.jobs.store.store import Store

log = get_logger(__name__)
_FORMAT = 1
#: A mark that nobody renews is forgotten after this time.
_MARK_SECONDS = 3_600
#: A worker of this store may have left its mark shortly before it ended.
_KNOWN_SECONDS = 300.0
#: Looks without a meeting after which another store is taken for gone.
_LOOKS = 20


class Namesakes:
    """Looks for another store's workers, for the life of a worker.

    `process`: this one; None where the system tells none, and then nothing is looked for.
    """

    def __init__(self, store: Store, broker: Broker, worker_id: int, *, name: str, process: Process | None) -> None:
        self._store = store
        self._broker = broker
        self._worker_id = worker_id
        self._mark = json.dumps({"format": _FORMAT, "worker": name, "process": str(process)})
        self._looks_for_any = process is not None
        self._has_marked = False
        #: Looks since another store was met; None where the row says that there is none.
        self._since: int | None = None

    def look(self) -> None:
        """Leaves the mark, and writes into the worker's row which worker it met. Raises StoreError."""
        if not self._looks_for_any:
            return
        try:
            before = self._broker.mark(self._store.id, self._mark, seconds=_MARK_SECONDS)
        except BrokerUnavailable:
            return  # the sender of wake-ups logs it
        met = self._stranger(before) if self._has_marked else None
        self._has_marked = True
        if met is not None:
            if self._since is None:
                log.warning("another store shows this one's id: give the copy its own by `batchmill db new-id`", by=met)
            self._since = 0
            self._store.registration.meet(self._worker_id, met)
        elif self._since is not None:
            self._since += 1
            if self._since >= _LOOKS:
                self._since = None
                self._store.registration.meet(self._worker_id, None)

    def _stranger(self, mark: str | None) -> str | None:
        """The name of a worker that this store does not know, if the mark is one's."""
        written = _parsed(mark)
        if mark == self._mark or written.get("format") != _FORMAT:
            return None
        process = Process.parse(str(written.get("process")))
        if process is None or self._store.workers.knows(process, within_seconds=_KNOWN_SECONDS):
            return None
        return str(written.get("worker"))


def _parsed(mark: str | None) -> dict[str, Any]:
    try:
        written = json.loads(mark or "{}")
    except ValueError:
        return {}
    return written if isinstance(written, dict) else {}
