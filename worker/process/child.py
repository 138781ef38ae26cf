"""The process that holds the model: it works when it is woken, and ends when its engine can go on no longer."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from batchmill.jobs.runtime.failpoints import failpoint
from batchmill.jobs.runtime.logs import get_logger
from batchmill.worker.devices.lock import DeviceLocks
from batchmill.worker.loop.rounds import Rounds
from batchmill.worker.loop.runner import Runner
from batchmill.worker.models.sources import Sources

log = get_logger(__name__)


class Child:
    """One child of one worker, with its engine, and with its devices for as long as it lives."""

    def __init__(
        self,
        runner: Runner,
        sources: Sources,
        *,
        finds_work: Callable[[], bool] = lambda: False,
        look_seconds: float | None = None,
        drain: threading.Event | None = None,
        locks: DeviceLocks | None = None,
        close: Callable[[], None] = lambda: None,
    ) -> None:
        self._runner = runner
        self._sources = sources
        self._drain = drain or threading.Event()
        self._locks = locks
        self._close = close
        self._rounds = Rounds(self.work, finds_work, every_seconds=look_seconds)

    def start(self) -> None:
        """Begins to work, also for what the child finds by itself every `look_seconds`."""
        self._rounds.start()

    def wake(self) -> None:
        """Works for what a wake-up told of; returns when there is no more work."""
        self._rounds.wake()

    def finish(self) -> None:
        """Hands back what is at work, and closes the engine when nothing is."""
        self._drain.set()
        self._rounds.finish()
        self._close()

    def work(self) -> None:
        """Works while there is work. An engine that fails ends the process: its device may be broken for good."""
        failpoint("child.woken")
        try:
            self._runner.run()
            if not self._sources.are_untouched():
                self._end_if_changed()
                self._runner.run()  # for the jobs that it left until it was known that the files are the same
        except Exception:
            log.exception("the engine failed; this process ends, and its batches are taken back")
            os._exit(1)

    def _end_if_changed(self) -> None:
        """Ends the process where another model lies in the files by now; the next one loads that."""
        changed = self._sources.changed()
        if changed is not None:
            log.warning("the model's files have changed; this process ends, and the next one loads them", what=changed)
            os._exit(0)
