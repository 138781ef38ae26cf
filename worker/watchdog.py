"""Ends a process that makes no progress, with the stacks of all threads printed.

It is armed only while a model loads and inside an engine's step, and knows neither. It works while the
interpreter is held by a hanging C call too, since faulthandler's timer is a thread of its own outside it.
"""

from __future__ import annotations

import faulthandler
from collections.abc import Iterator
from contextlib import contextmanager


class Watchdog:
    """Armed for `seconds` by `watching()`, and anew by each `rearm()` inside."""

    def __init__(self) -> None:
        self._seconds = 0.0

    @contextmanager
    def watching(self, seconds: float) -> Iterator[None]:
        """Ends the process (exit code 1) when the block shows no progress for so long."""
        self._seconds = seconds
        self.rearm()
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
            self._seconds = 0.0

    def rearm(self) -> None:
        """Says that there was progress; outside of `watching` it does nothing."""
        if self._seconds:
            faulthandler.dump_traceback_later(self._seconds, exit=True)
