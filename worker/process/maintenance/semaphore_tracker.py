"""The process in which billiard tracks semaphores, started again where somebody killed it.

Without it no child could be started: each has semaphores, and billiard reports them to the tracker by a pipe.
"""

from __future__ import annotations

import os
import select
import threading
from typing import Any

from billiard import semaphore_tracker


class LastingTracker(semaphore_tracker.SemaphoreTracker):  # type: ignore[misc]
    """A tracker of which the next process knows what the last one knew."""

    _fd: Any

    def __init__(self) -> None:
        super().__init__()
        self._names: set[str] = set()
        # A semaphore may be collected, and unregistered, in the middle of any of this.
        self._alone = threading.RLock()

    def ensure_running(self) -> None:
        """Starts the process where there is none, or none any more, and tells it of all semaphores."""
        with self._alone:
            if self._fd is not None and _is_unread(self._fd):
                os.close(self._fd)
                self._fd = None
            is_new = self._fd is None
            super().ensure_running()
            for name in list(self._names) if is_new else ():
                self._tell("REGISTER", name)

    def _send(self, command: str, name: str) -> None:
        with self._alone:
            self.ensure_running()
            self._tell(command, name)
            (self._names.add if command == "REGISTER" else self._names.discard)(name)

    def _tell(self, command: str, name: str) -> None:
        os.write(self._fd, f"{command}:{name}\n".encode())


_tracker = LastingTracker()


def outlast_trackers() -> None:
    """From now on billiard uses the tracker that lasts, in this process; called before it has made a semaphore."""
    for name in ("ensure_running", "register", "unregister", "getfd"):
        setattr(semaphore_tracker, name, getattr(_tracker, name))


def _is_unread(pipe: int) -> bool:
    """True where nobody has the other end of a pipe that is written to."""
    poll = select.poll()
    poll.register(pipe, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
