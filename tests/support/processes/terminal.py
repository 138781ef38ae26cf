"""A terminal of so many columns, in which a real command runs: what it shows, and keys that are pressed."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

_ROWS = 50
_PATIENCE_SECONDS = 300.0


class Terminal:
    """Runs a command until the block ends."""

    def __init__(self, command: Sequence[str | Path], *, env: Mapping[str, str], columns: int = 100) -> None:
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", _ROWS, columns, 0, 0))
        self._process = subprocess.Popen(
            [str(each) for each in command],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={"TERM": "xterm", **env},
            start_new_session=True,
        )
        os.close(theirs)
        self.shown = ""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        os.close(self._ours)

    def press(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def interrupt(self) -> int:
        """Ends the command as Ctrl-C does: its exit code."""
        self._process.send_signal(signal.SIGINT)
        while self._process.poll() is None:
            if select.select([self._ours], [], [], 1.0)[0]:
                with suppress(OSError):
                    self.shown += os.read(self._ours, 65_536).decode(errors="replace")
        return int(self._process.wait())

    def until(self, text: str) -> str:
        """Everything that was shown up to now, once the text is there."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while text not in self.shown:
            assert time.monotonic() < deadline, f"{text!r} is not shown: {self.shown!r}"
            if select.select([self._ours], [], [], 1.0)[0]:
                self.shown += self._read(text)
        return self.shown

    def _read(self, text: str) -> str:
        try:
            return os.read(self._ours, 65_536).decode(errors="replace")
        except OSError:  # the command has ended
            raise AssertionError(f"{text!r} was never shown: {self.shown!r}") from None
