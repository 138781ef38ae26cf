"""The watchdog: ends a child that makes no progress, and logs the stacks of all its threads.

It is a thread of the parent, and counts only time in which both were allowed to run: a process that was stopped, or
frozen or suspended with its parent, is not ended for that. It knows the child by its pulse alone.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress

import psutil

from batchmill.jobs.runtime.logs import get_logger
from batchmill.worker.process.pulse import Pulse

log = get_logger(__name__)
_TICK_SECONDS = 0.25
#: A look that comes later than this was held up with the whole machine, and counts no more than this.
_MOST_SECONDS = 2 * _TICK_SECONDS
#: The time that a child has to tell its stacks before it is ended.
_TELL_SECONDS = 1.0
#: The signal at which a child tells its stacks. A process that is not prepared for it ignores it.
_ASK_SIGNAL = signal.SIGURG
_PAUSED = (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)


def tell_stacks_when_asked(pulse: Pulse) -> None:
    """Lets this process tell its stacks, in a handler in C that works while the interpreter is held."""
    faulthandler.register(_ASK_SIGNAL, file=pulse.open_words())


class Watchdog:
    """Ends the child of a pulse that stands still. `pids`: the processes that it may end."""

    def __init__(self, pulse: Pulse, *, pids: Callable[[], Collection[int]]) -> None:
        self._pulse = pulse
        self._pids = pids
        self._last = pulse.read()
        self._silent_seconds = 0.0
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def _run(self) -> None:
        before = time.monotonic()
        while True:
            time.sleep(_TICK_SECONDS)
            now = time.monotonic()
            self._look(min(now - before, _MOST_SECONDS))
            before = now

    def _look(self, seconds: float) -> None:
        """Counts the time since the last look, unless there was progress in it or the child was stopped."""
        beat = self._pulse.read()
        if beat != self._last or not beat.limit_seconds:
            self._last = beat
            self._silent_seconds = 0.0
        elif not _is_paused(beat.pid):
            self._silent_seconds += seconds
            if self._silent_seconds >= beat.limit_seconds and beat.pid in self._pids():
                self._end(beat.pid)

    def _end(self, pid: int) -> None:
        self._silent_seconds = 0.0
        with suppress(ProcessLookupError):
            os.kill(pid, _ASK_SIGNAL)
            time.sleep(_TELL_SECONDS)
            stack = self._pulse.take_words() or None
            log.error(
                "the child makes no progress, so it is ended", pid=pid, seconds=self._last.limit_seconds, stack=stack
            )
            os.kill(pid, signal.SIGKILL)


def _is_paused(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() in _PAUSED
    except psutil.NoSuchProcess:
        return False
