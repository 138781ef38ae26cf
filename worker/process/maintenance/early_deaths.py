"""Children that end before they report to the store: counted, and told of with the last lines that they wrote.

An import may fail, or the environment may be hostile. Celery starts the next child at once, and nobody else would ever
hear of it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence

from batchmill.jobs.store.workers.registration import Heartbeat

#: The number in a row after which the worker gives up.
_MOST = 3
_TAIL_BYTES = 8 * 1024
_TAIL_LINES = 15
_DRAIN_SECONDS = 0.5
_STDERR = 2


class EarlyDeaths:
    """Counts early deaths. `pids`: the children that there are; `is_running`: true while one of them lives."""

    def __init__(self, pids: Callable[[], Sequence[int]], is_running: Callable[[int], bool]) -> None:
        self._pids = pids
        self._is_running = is_running
        self._unjudged: set[int] = set()
        self._judged: set[int] = set()
        self._dead: set[int] = set()
        self._generation = 0
        self._count, self._enough = 0, _MOST
        self._tail = _StderrTail()

    def happened(self) -> bool:
        """Looks after the children; True where one has ended that was not judged yet."""
        pids = set(self._pids())
        self._judged &= pids  # Celery lists one that has ended for a while
        self._unjudged |= pids - self._judged
        self._dead = {pid for pid in self._unjudged if not self._is_running(pid)}
        return bool(self._dead)

    def judge(self, beat: Heartbeat) -> str | None:
        """Judges those that have ended by what the store knows now. Returns why the worker gives up, if it does."""
        self._unjudged -= self._dead
        self._judged |= self._dead
        self.reported(beat)
        if not self._dead or beat.child_pid in self._dead:
            return None
        self._count += len(self._dead)
        if not self._tail.begun:
            self._tail.begin()
            # The next child may have been started before, so it is the one after that whose lines are kept.
            self._enough = max(_MOST, self._count + 2)
        if self._count < self._enough:
            return None
        lines = self._tail.end()
        words = "\n".join(["; the last lines:", *lines]) if lines else ", without a word"
        return f"{self._count} processes in a row ended before they could load the model{words}"

    def reported(self, beat: Heartbeat) -> None:
        """Begins anew after a child has reported, which proves that children can begin."""
        if beat.generation > self._generation:
            self._generation, self._count = beat.generation, 0
            self._tail.end()


class _StderrTail:
    """The end of what this process, and the children that it starts meanwhile, write to stderr; all is passed on."""

    def __init__(self) -> None:
        self.begun = False
        self._kept = b""

    def begin(self) -> None:
        self._kept = b""
        self._real = os.dup(_STDERR)
        reader, writer = os.pipe()
        os.dup2(writer, _STDERR)
        os.close(writer)
        self.begun = True
        self._thread = threading.Thread(target=self._pass_on, args=(reader, self._real), name="stderr", daemon=True)
        self._thread.start()

    def end(self) -> list[str]:
        """The last lines since `begin`. A child that lives goes on writing there, and is passed on."""
        if not self.begun:
            return []
        os.dup2(self._real, _STDERR)
        self.begun = False
        self._thread.join(_DRAIN_SECONDS)
        return self._kept.decode(errors="replace").splitlines()[-_TAIL_LINES:]

    def _pass_on(self, reader: int, real: int) -> None:
        while data := os.read(reader, 65_536):
            self._kept = (self._kept + data)[-_TAIL_BYTES:]
            os.write(real, data)
        os.close(reader)
        os.close(real)
