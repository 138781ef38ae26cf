"""The drain of a worker: it saves what is finished, hands back the rest, and ends.

SIGTERM reaches the parent, whose keeper passes it on to the child as the drain signal, again and again until the child
has ended or `drain_seconds` are over.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

#: The signal by which a parent tells its child to hand everything back.
DRAIN_SIGNAL = signal.SIGUSR2


class DrainSwitch:
    """The effect of the drain signal: it ends a process that is still loading, and stops one that works."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self._loaded = False
        signal.signal(DRAIN_SIGNAL, self._on_signal)

    def loaded(self) -> None:
        self._loaded = True

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self.asked.set()
        if not self._loaded:
            os._exit(0)
