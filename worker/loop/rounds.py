"""The one thread that drives a child's engine, a round at a time: at a wake-up, or for work that it finds by itself.

Wake-ups only make it quick. They may be lost, and Redis may be away, full or shared with others: a child without work
polls the store every so often, so pending work is never left behind.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from batchmill.jobs.runtime.logs import get_logger

log = get_logger(__name__)


class Rounds:
    """Runs rounds on its thread.

    `work`: one round, which ends when there is no more work. `finds_work`: looks for some; it is called when idle.
    """

    def __init__(
        self, work: Callable[[], None], finds_work: Callable[[], bool], *, every_seconds: float | None
    ) -> None:
        self._work = work
        self._finds_work = finds_work
        self._every_seconds = every_seconds
        self._condition = threading.Condition()
        self._asked = self._done = 0
        self._at_work = self._over = False
        self._thread = threading.Thread(target=self._run, name="rounds", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """Asks for a round; returns when one that began after this call has ended."""
        with self._condition:
            self._asked += 1
            mine = self._asked
            self._condition.notify_all()
            self._condition.wait_for(lambda: self._done >= mine)

    def finish(self) -> None:
        """Lets no further round begin, and returns when none is at work."""
        with self._condition:
            self._over = True
            self._condition.notify_all()
            self._condition.wait_for(lambda: not self._at_work)

    def _run(self) -> None:
        try:
            while self._round():
                pass
        except Exception:
            log.exception("the look for work failed; this process ends, and another takes its place")
            os._exit(1)

    def _round(self) -> bool:
        """Waits for a reason, and runs one round. False when it was the last."""
        with self._condition:
            woken = self._condition.wait_for(self._has_reason, timeout=self._every_seconds)
            if self._over:
                return False
            asked, self._at_work = self._asked, True
        if woken or self._finds_work():
            self._work()
        with self._condition:
            self._done, self._at_work = asked, False
            self._condition.notify_all()
        return True

    def _has_reason(self) -> bool:
        return self._over or self._asked > self._done
