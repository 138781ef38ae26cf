"""One careful pass of reconciling, so that commands work with no worker alive.

It sends no wake-ups, and does without a store that is locked or away. It takes leases back only where a cancelled job
waits for them, a whole lease's length after they ended. All other leases are left to the workers: after an outage of
the store they may have ended though their holders live, and renew them with their next save. So may the leases of
submits that load.
"""

from __future__ import annotations

from batchmill.jobs.configuration.settings import Settings
from batchmill.jobs.errors import StoreError
from batchmill.jobs.requests.states import JobState
from batchmill.jobs.store.store import Store

#: The time for which a command waits for a locked store before it does without this pass.
_BUSY_SECONDS = 0.2


def tidy(settings: Settings) -> None:
    """Takes back the expired leases that cancelled jobs wait for, and closes jobs that are finished."""
    store = Store(settings.database, busy_seconds=_BUSY_SECONDS)
    try:
        cancelling = frozenset({JobState.CANCELLING})
        seconds = settings.lease_seconds
        store.recovery.reap(store.recovery.expired(lease_seconds=seconds, for_seconds=seconds, of_jobs=cancelling))
        store.closing.close_finished()
    except StoreError:
        pass
    finally:
        store.close()
