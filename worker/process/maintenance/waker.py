"""A thread that sends wake-ups when it is asked: a Redis that hangs never holds up a heartbeat or a lease."""

from __future__ import annotations

import threading
from collections.abc import Callable

from batchmill.jobs.errors import StoreError
from batchmill.jobs.runtime.logs import get_logger

log = get_logger(__name__)


class Waker:
    """`send` sends what the queues lack; several requests that come while it is at work are one."""

    def __init__(self, send: Callable[[], None]) -> None:
        self._send = send
        self._condition = threading.Condition()
        self._asked = self._sent = 0
        self._thread = threading.Thread(target=self._run, name="waker", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """Returns at once."""
        with self._condition:
            self._asked += 1
            self._condition.notify_all()

    def wait(self, *, seconds: float) -> None:
        """Until what was asked for is sent, or so long."""
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
                # The bottom of this thread: it has to outlive whatever a library makes of a broken connection.
                log.exception("no wake-ups sent; the next pass sends them")
            with self._condition:
                self._sent = asked
                self._condition.notify_all()
