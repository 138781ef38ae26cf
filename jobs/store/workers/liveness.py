"""Liveness: when a worker counts as alive, as dead, or as one that has given up."""

from __future__ import annotations

from sqlalchemy import ColumnElement, and_

from batchmill.jobs.requests.states import WorkerState
from batchmill.jobs.store.tables import workers

#: A worker counts as dead after this many heartbeats that did not come.
MISSED_HEARTBEATS = 4
#: A clock that is set back by less makes nobody dead.
_CLOCK_SLACK_SECONDS = 1.0
#: The states in which a worker takes no work any more, and for which its row keeps the reason.
GIVEN_UP = frozenset({WorkerState.FAILED, WorkerState.SICK})


def alive(now: ColumnElement[float]) -> ColumnElement[bool]:
    """True for a row of a live worker that has not given up.

    One last seen in the future counts as dead until its next heartbeat: the store's clock was set back since.
    """
    seen = workers.c.heartbeat_at <= now + _CLOCK_SLACK_SECONDS
    return and_(workers.c.alive_until > now, seen, workers.c.state.not_in(GIVEN_UP))
