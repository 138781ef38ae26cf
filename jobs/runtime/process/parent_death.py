"""The signal that comes when a process's parent dies; not in `signals`, since ctypes takes time to import."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_parent(number: signal.Signals, parent_pid: int) -> None:
    """Has Linux send this process the signal when the thread that started it ends; at once if it has ended by now."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
        if os.getppid() != parent_pid:
            os.kill(os.getpid(), number)
