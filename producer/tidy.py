"""One careful pass of reconciling, for commands: so that they work with no worker alive.

It sends nothing, takes back only leases that expired a whole lease's length ago, and skips a locked store.
"""

from __future__ import annotations

from jobs.errors import StoreBusy
from jobs.settings import Settings
from jobs.store import Store

#: How long a command waits for a locked store before it does without this pass.
_BUSY_SECONDS = 0.2


def tidy(settings: Settings) -> None:
    """Takes back long expired leases, deletes dead submits, closes what is finished."""
    store = Store(settings.database, busy_seconds=_BUSY_SECONDS)
    try:
        store.recovery.reap(store.recovery.expired(for_seconds=settings.lease_seconds))
        store.loading.discard_expired()
        store.closing.close_finished()
    except StoreBusy:
        pass
    finally:
        store.close()
