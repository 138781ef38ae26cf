"""SIGTERM in the first moments of a process.

SIGTERM may come before anything is there that could hand work back. A process that becomes a worker, or starts one,
blocks it first; a new program inherits that, so the signal stays pending until the worker's first lines admit it. From
then on it ends the process at once, until there is something to hand back. An exception would not do: it would come in
the middle of an import, and some of those swallow whatever is raised. Imports nothing of batchmill's, since the entry
points call it before their imports.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType


def block_sigterm() -> None:
    """Keeps SIGTERM pending, in this process and in the program that it becomes, until `exit_on_sigterm`."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def exit_on_sigterm() -> None:
    """Makes SIGTERM, also a pending one, end this process at once with 0."""
    _admit_sigterm(lambda *_: os._exit(0))


def raise_on_sigterm() -> None:
    """Makes SIGTERM, also a pending one, end this process as a failure, and what it began is cleaned up."""
    _admit_sigterm(lambda *_: sys.exit(128 + signal.SIGTERM))


def note_sigterm() -> threading.Event:
    """An event that SIGTERM sets, until another handler takes the place of this one."""
    came = threading.Event()
    _admit_sigterm(lambda *_: came.set())
    return came


def _admit_sigterm(handler: Callable[[int, FrameType | None], object]) -> None:
    signal.signal(signal.SIGTERM, handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
