"""Interrupts that wait for the end of a transaction.

An exception that a signal raises may come between the begin of a transaction and the line that would end it. Its
traceback keeps all of that alive for as long as the exception is handled; a `run` that waits for its worker then would
keep this worker out of the store.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class _Here(threading.local):
    """The state of one thread; signals are handled in the main thread alone."""

    depth = 0
    pending = False


_here = _Here()


def interrupt(*_: object) -> None:
    """Handles a signal: raises KeyboardInterrupt, within `interrupts_later` at its end, or at the second signal."""
    if _here.depth and not _here.pending:
        _here.pending = True
    else:
        raise KeyboardInterrupt


@contextmanager
def interrupts_later() -> Iterator[None]:
    """A context that `interrupt` lets come to its end."""
    _here.depth += 1
    try:
        yield
    finally:
        _here.depth -= 1
        if _here.pending and not _here.depth:
            _here.pending = False
            raise KeyboardInterrupt
