"""Measures how long the mill takes to recover from each fault, against its own bounds.

A watch is polled until the event that it waits for has come. It counts against its bound only when nothing else
was broken meanwhile that it could not recover without; both kinds are kept.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic

from batchmill.jobs.errors import StoreError
from tests.tools.soak.world import World

#: A watch that waits longer than this counts as waiting for ever.
_GIVE_UP_SECONDS = 300.0
#: A thing that was broken disturbs for so long after it was mended: pauses between attempts have grown meanwhile.
_AFTERMATH_SECONDS = 10.0
#: The scopes that all workers need.
EVERYBODYS = ("store", "redis")


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of recovery and its bound."""

    name: str
    bound_seconds: float | None = None
    #: The broken things that excuse it: names of scopes, or `own` for the same worker.
    excused_by: tuple[str, ...] = ("store", "own")


# Celery replaces no process while it looks for Redis.
READY = Kind("child killed: replaced and ready", 15.0, ("store", "own", "redis"))
AGAIN = Kind("child killed: its work runs again", 15.0, ("store", "own", "redis"))
ORPHANS = Kind("parent killed: its leases are taken back", 60.0, ("store",))
ORPHAN_CHILD = Kind("parent killed: its child is gone")
# Leases that `clock` moved were renewed, to whoever watches them expire.
DEAD_HOST = Kind("host dead: its leases are taken back", 120.0, ("store", "clock"))
CONTAINER = Kind("container restarted: its leases are taken back", 120.0, ("store", "clock"))
EMPTIED = Kind("Redis emptied: work is claimed again", 30.0, ("store", "redis", "own"))
FULL = Kind("Redis full: work is claimed again", 40.0, ("store", "redis", "own"))
LOCKED_OUT = Kind("Redis with a new password: work is claimed again", 40.0, ("store", "redis", "own"))
REDIS_BACK = Kind("Redis back, empty: work is claimed again", 30.0, ("store", "own"))
# By a child, say, that was stopped within a transaction.
STORE_BACK = Kind("store back: outputs are saved again", 30.0, ("store",))
KINDS = (
    READY,
    AGAIN,
    ORPHANS,
    ORPHAN_CHILD,
    DEAD_HOST,
    CONTAINER,
    EMPTIED,
    FULL,
    LOCKED_OUT,
    REDIS_BACK,
    STORE_BACK,
)


@dataclass(slots=True)
class Breakage:
    """A time in which something was broken: `store`, `redis`, `clock`, or a worker's name."""

    scope: str
    began: float
    ended: float | None = None

    def overlaps(self, since: float, until: float) -> bool:
        aftermath = _AFTERMATH_SECONDS if self.scope in EVERYBODYS else 0.0
        return self.began <= until and (self.ended is None or self.ended + aftermath >= since)


@dataclass(slots=True)
class Watch:
    kind: Kind
    worker: str
    condition: Callable[[], bool]
    began: float = field(default_factory=monotonic)


@dataclass(slots=True)
class Measured:
    """One recovery. `excused`: by what else was broken."""

    kind: Kind
    worker: str
    seconds: float
    excused: tuple[str, ...]

    @property
    def is_late(self) -> bool:
        bound = self.kind.bound_seconds
        return bound is not None and not self.excused and self.seconds > bound


class Measures:
    """All watches and what came of them."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._watches: list[Watch] = []
        self._breakages: list[Breakage] = []
        self.found: list[Measured] = []

    def broken(self, scope: str) -> Breakage:
        """Something is broken from now until `mended`."""
        breakage = Breakage(scope, monotonic())
        self._breakages.append(breakage)
        return breakage

    def mended(self, breakage: Breakage) -> None:
        breakage.ended = monotonic()

    def watch(self, kind: Kind, condition: Callable[[], bool], *, worker: str = "") -> None:
        """Waits until `condition`, which may raise StoreError while the store is away."""
        self._watches.append(Watch(kind, worker, condition))

    def poll(self) -> None:
        for each in list(self._watches):
            seconds = monotonic() - each.began
            if self._holds(each) or seconds > _GIVE_UP_SECONDS:
                self._watches.remove(each)
                self._take(each, seconds)

    @property
    def waiting(self) -> int:
        return len(self._watches)

    def of(self, kind: Kind) -> list[Measured]:
        return [each for each in self.found if each.kind is kind]

    def _holds(self, watch: Watch) -> bool:
        try:
            return watch.condition()
        except StoreError:
            return False

    def _take(self, watch: Watch, seconds: float) -> None:
        measured = Measured(watch.kind, watch.worker, round(seconds, 1), self._excuses(watch))
        self.found.append(measured)
        details = {"kind": watch.kind.name, "worker": watch.worker, "after": measured.seconds}
        self._world.note("measured", **details, excused=measured.excused, aloud=False)
        if measured.is_late:
            late = f"{seconds:.1f} s, bound {watch.kind.bound_seconds:.0f} s, load {os.getloadavg()[0]:.1f}"
            self._world.problem(f"{watch.kind.name} ({watch.worker}): {late}")

    def _excuses(self, watch: Watch) -> tuple[str, ...]:
        scopes = {watch.worker if each == "own" else each for each in watch.kind.excused_by}
        now = monotonic()
        # The fault that began the watch is a breakage of its own worker, too; it ended before or with its beginning.
        hit = {
            each.scope
            for each in self._breakages
            if each.scope in scopes and each.overlaps(watch.began, now) and not self._is_cause(each, watch)
        }
        return tuple(sorted(hit))

    @staticmethod
    def _is_cause(breakage: Breakage, watch: Watch) -> bool:
        return breakage.ended is not None and abs(breakage.ended - watch.began) < 0.05
