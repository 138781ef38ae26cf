"""The processes of Celery's pool, as the parent sees them: their pids, signals and ends."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic, sleep
from typing import Any

import psutil

from batchmill.jobs.runtime.process.process import end_of

#: The longest wait for a child's exit code: while Celery's thread asks the system for it, nobody else gets it.
_NOTED_SECONDS, _NOTED_TICK_SECONDS = 2.0, 0.02


@dataclass(slots=True)
class Pool:
    """The processes of Celery's pool; there are none before it starts and after it stopped."""

    celery_worker: Any

    def pids(self) -> list[int]:
        return [process.pid for process in getattr(self._processes, "_pool", ()) if process.pid]

    def ended_by(self, pid: int | None) -> str | None:
        """The signal or exit code that ended a child, also one that was replaced; None where it is not known."""
        end = getattr(self._processes, "ends", {}).get(pid)
        until = monotonic() + _NOTED_SECONDS
        while end is not None:
            code = end.poll()
            if code is not None:
                return end_of(code)
            if monotonic() >= until:
                break
            sleep(_NOTED_TICK_SECONDS)
        return None

    def signal(self, number: int) -> None:
        for pid in self.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    @property
    def _processes(self) -> Any:
        return getattr(getattr(self.celery_worker, "pool", None), "_pool", None)


def is_running(pid: int) -> bool:
    """True while a process lives; False for a zombie, too."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
