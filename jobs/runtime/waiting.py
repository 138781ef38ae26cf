"""Reports of waits that take more than two seconds: what for, since when, and who holds it, as far as known.

One thread of the process watches all of its waits, so that a short wait costs next to nothing.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime

from batchmill.jobs.runtime.command_errors import say

#: A shorter wait is not reported.
FIRST_SECONDS = 2.0
#: The next report comes once the wait has taken so many times as long again.
_GROWTH = 4
_LOOK_SECONDS = 0.5
#: The thread rests after so many looks at no wait, until the next one begins.
_IDLE_LOOKS = 20
#: A wait that failed goes on where the same is waited for again within this time.
_AGAIN_SECONDS = 15.0

_speak: Callable[[str], object] = say


class Wait:
    """One wait. `is_certain`: it is reported also where no holder is known."""

    def __init__(self, what: str, holder: Callable[[], str | None], *, is_certain: bool) -> None:
        self._what = what
        self._holder = holder
        self._is_certain = is_certain
        self._began = time.monotonic()
        self._due = self._began + FIRST_SECONDS
        self._ended = 0.0

    def is_vain(self) -> bool:
        """Ends a wait that failed: True where it was long enough for a report."""
        self._ended = time.monotonic()
        return self._is_certain and self._ended - self._began >= FIRST_SECONDS

    def continue_from(self, earlier: Wait) -> None:
        """Takes over the beginning of an earlier failed wait for the same, unless that ended long ago."""
        if self._began - earlier._ended < _AGAIN_SECONDS:
            self._began, self._due = earlier._began, earlier._due

    def works(self) -> None:
        """Notes that the block may be at work: from now on the wait is reported only where a holder is known."""
        self._is_certain = False

    def tell_if_due(self) -> None:
        """Reports the wait where its next report is due."""
        seconds = time.monotonic() - self._began
        if self._began + seconds < self._due:
            return
        self._due = self._began + _GROWTH * seconds
        holder = self._holder()
        if holder is None and not self._is_certain:
            return
        since = datetime.fromtimestamp(time.time() - seconds, UTC).strftime("%H:%M:%S UTC")
        locked = "" if holder is None else f", which is locked by {holder}"
        _speak(f"waiting since {since} ({seconds:.0f} s) for {self._what}{locked}")


@contextmanager
def telling(what: str, *, holder: Callable[[], str | None] = lambda: None, is_certain: bool = True) -> Iterator[Wait]:
    """Tells the user, or the log, that the block takes long.

    `holder`: names the process that is waited for, None where unknown; it is called in another thread, for a report.
    `is_certain`: the block does nothing but wait; otherwise it is reported only if there is a holder.
    """
    wait = Wait(what, holder, is_certain=is_certain)
    if (earlier := _vain.pop(what, None)) is not None:
        wait.continue_from(earlier)
    _watch.add(wait)
    try:
        yield wait
    except Exception:
        if wait.is_vain():
            _vain[what] = wait
        raise
    finally:
        _watch.remove(wait)


def tell_by(speak: Callable[[str], object]) -> None:
    """Sets the function that reports the waits of this process; the default writes to stderr."""
    global _speak
    _speak = speak


class _Watch:
    """The thread that watches all waits of this process; the first of them starts it."""

    def __init__(self) -> None:
        self._waits: set[Wait] = set()
        self._is_looking = threading.Event()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def add(self, wait: Wait) -> None:
        self._waits.add(wait)
        if not self._is_looking.is_set():
            self._look()

    def remove(self, wait: Wait) -> None:
        self._waits.discard(wait)

    def _look(self) -> None:
        with self._lock:
            self._is_looking.set()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="waiting", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        idle = 0
        while True:
            self._is_looking.wait()
            time.sleep(_LOOK_SECONDS)
            waits = list(self._waits)
            for each in waits:
                with suppress(OSError, ValueError):  # of a stderr that nobody reads any more
                    each.tell_if_due()
            idle = 0 if waits else idle + 1
            if idle >= _IDLE_LOOKS:
                idle = 0
                self._is_looking.clear()
                if self._waits:  # one that began at this very moment
                    self._is_looking.set()


_watch = _Watch()
#: The last waits that failed, by what they were for.
_vain: dict[str, Wait] = {}


def _begin_anew() -> None:
    """Begins without waits in a forked child, which has none of its parent's threads."""
    global _watch
    _watch = _Watch()


os.register_at_fork(after_in_child=_begin_anew)
