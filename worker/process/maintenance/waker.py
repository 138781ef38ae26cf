"""A thread that sends wake-ups when it is asked: a Redis that hangs never holds up a heartbeat or a lease."""

from __future__ import annotations

import threading
from collections.abc import Callable

from batchmill.jobs.errors import StoreError
from batchmill.jobs.runtime.logs import get_logger

log = get_logger(__name__)


class Waker:
    """Calls `send` for the queues when it is asked; requests that come while it is at work become one."""

    def __init__(self, send: Callable[[], None]) -> None:
        self._send = send
        self._condition = threading.Condition()
        self._asked = self._sent = 0
        self._thread = threading.Thread(target=self._run, name="waker", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """Asks for wake-ups to be sent; returns at once."""
        with self._condition:
            self._asked += 1
            self._condition.notify_all()

    def wait(self, *, seconds: float) -> None:
        """Waits until what was asked for is sent, at most this long."""
        with self._condition:
            asked = self._asked
            self._condition.wait_for(lambda: self._sent >= asked, timeout=seconds)

    def _run(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._asked > self._sent)
                asked = self._asked
            try:
                self._send()
            except StoreError as error:
                log.warning("no wake-ups sent; the next pass sends them", error=str(error))
            except Exception:
                # The bottom of this thread, which has to outlive any error that a library makes of a lost connection.
                log.exception("no wake-ups sent; the next pass sends them")
            with self._condition:
                self._sent = asked
                self._condition.notify_all()
