"""Waiting that is told of once it takes more than two seconds: what for, since when, and who holds it, as far as known.

One thread of the process looks after all that it waits for, so that a wait that is short costs next to nothing.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime

from batchmill.jobs.runtime.command_errors import say

#: Less is no news.
FIRST_SECONDS = 2.0
#: It is told of again after so many times as long.
_GROWTH = 4
_LOOK_SECONDS = 0.5
#: So many looks without anything to wait for end the looking, until something is waited for again.
_IDLE_LOOKS = 20
#: A wait that was given up goes on where the same is waited for again so soon.
_AGAIN_SECONDS = 15.0

_speak: Callable[[str], object] = say


class Wait:
    """One wait. `is_certain`: it is told of also where nobody is known to be the cause."""

    def __init__(self, what: str, holder: Callable[[], str | None], *, is_certain: bool) -> None:
        self._what = what
        self._holder = holder
        self._is_certain = is_certain
        self._began = time.monotonic()
        self._due = self._began + FIRST_SECONDS
        self._ended = 0.0

    def is_vain(self) -> bool:
        """True at the end of a wait that was long and got nothing."""
        self._ended = time.monotonic()
        return self._is_certain and self._ended - self._began >= FIRST_SECONDS

    def continue_from(self, earlier: Wait) -> None:
        """Takes over the beginning of a wait in vain for the same, unless that was long ago."""
        if self._began - earlier._ended < _AGAIN_SECONDS:
            self._began, self._due = earlier._began, earlier._due

    def works(self) -> None:
        """The block no longer waits for sure: from now on it is told of only where somebody is in its way."""
        self._is_certain = False

    def tell_if_due(self) -> None:
        """Tells of it where it has taken long enough since it was last told of."""
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
    """Tells the user, or the log, where the block takes long.

    `holder`: who is waited for, asked in another thread when it is told, None where that is not known. `is_certain`:
    the block does nothing but wait; else it is told only if there is a holder.
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
    """From now on this process tells of its waits so; without it, on stderr."""
    global _speak
    _speak = speak


class _Watch:
    """The thread that looks after all waits of this process, begun with the first of them."""

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
#: The last waits in vain, by what they were for.
_vain: dict[str, Wait] = {}


def _begin_anew() -> None:
    """A forked child has none of its parent's threads, and nothing to wait for yet."""
    global _watch
    _watch = _Watch()


os.register_at_fork(after_in_child=_begin_anew)
