"""Standard input, output and error of a process, any of which may be closed or lead to a full disk.

/dev/null takes the place of a closed one: the next file or socket that is opened would get its number, and what is
printed. Nothing on stderr is worth the work, so what cannot be written there is dropped.
"""

from __future__ import annotations

import io
import os
import sys
from typing import Any

_STDERR = 2


def hold_standard_files() -> None:
    """Called by an entry point before it opens anything. A closed stdout stays one that cannot be written."""
    for number, mode in ((0, os.O_RDONLY), (1, os.O_RDONLY), (_STDERR, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, mode)  # which gets the lowest number that is free
            os.set_inheritable(number, True)
    sys.stderr = io.TextIOWrapper(
        io.BufferedWriter(_Careless(_STDERR, "w", closefd=False)),
        encoding=sys.stderr.encoding if sys.stderr is not None else "utf-8",
        errors="backslashreplace",
        line_buffering=True,
    )


class _Careless(io.FileIO):
    """A file that drops what it cannot write."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data) or 0
        except OSError:
            return memoryview(data).nbytes
