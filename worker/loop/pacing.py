"""The pacing of syncs: the moment at which a child syncs with the store, and how much it claims and records then.

Plain arithmetic: no threads, no database, no engine. The saver guards it with its lock.
"""

from __future__ import annotations

from dataclasses import dataclass

from batchmill.worker.loop.holdings import Holdings

#: Bytes of held requests from which no more is claimed: eight million tokens, more than a device's cache holds.
HELD_BYTES = 32 * 1024**2


@dataclass(slots=True)
class Pacing:
    """The state that decides on the next sync. While `draining`, no more is claimed or recorded."""

    #: The engine's rows.
    rows: int
    holdings: Holdings
    #: Requests in the engine's own queue, which no row works on yet.
    engine_waiting: int = 0
    #: The engine has neither waiting nor active requests.
    engine_empty: bool = True
    #: Outputs were left for the next sync, since one transaction takes only so many bytes.
    more: bool = False
    #: Nothing could be claimed at the last sync, so there is no hurry to ask again.
    dry: bool = False
    #: The store did not answer the last sync, so nobody knows whether it was committed.
    away: bool = False
    #: The spool takes no more, so nothing enters the engine.
    full: bool = False

    @property
    def fill(self) -> int:
        """Requests that a sync fills up to: more than the rows, so that not every finished row needs its own sync."""
        return self.rows + max(1, self.rows // 4)

    @property
    def recorded(self) -> int:
        """Requests recorded as in flight that no row of the engine works on yet."""
        return len(self.holdings.recorded) + self.engine_waiting

    @property
    def entering(self) -> int:
        """Recorded requests that may enter the engine now, whose own queue they fill."""
        return min(max(0, self.fill - self.engine_waiting), len(self.holdings.recorded))

    def is_urgent(self, *, draining: bool) -> bool:
        """True where a sync now, before its time, gives the engine more to do or ends the task."""
        is_short = self.recorded < self.rows
        if self.away:
            return not self.full and is_short and self.holdings.waiting > 0
        if draining or self.more:
            return True
        if is_short and (self.holdings.waiting or not (self.dry or self._is_laden)):
            return True
        return self.engine_empty and not self.holdings.recorded and (self.holdings.unsaved > 0 or self.dry)

    def room(self, *, draining: bool) -> int:
        """The number of requests that the next sync may record as in flight."""
        return 0 if draining else max(0, self.fill - self.recorded)

    def wanted(self, *, draining: bool) -> int:
        """The number of requests that the next sync claims."""
        if draining or self._is_laden:
            return 0
        return max(0, self.rows - self.recorded - self.holdings.waiting)

    @property
    def _is_laden(self) -> bool:
        """True where what is held takes so much memory that no more is claimed."""
        return self.holdings.size_bytes >= HELD_BYTES
