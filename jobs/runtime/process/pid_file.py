"""A file that names one process of a home, for those that come after it has died; `process` spells its line."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

import psutil

from batchmill.jobs.runtime.process.process import Lives, Process

_END_SECONDS = 5.0


class PidFile:
    """Written when the process starts, removed when it ends; a power cut or a kill leaves it behind."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, pid: int) -> None:
        """Names this process; by its pid alone where the system tells no more, from which nothing is concluded."""
        self._path.write_text(f"{Process.of(pid) or pid}\n")

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)

    @property
    def lives(self) -> Lives:
        """Tells whether the named process lives."""
        text = self._text()
        named = Process.parse(text)
        if named is None:
            return Lives.UNKNOWN if text.isdecimal() else Lives.NO
        return named.lives()

    @property
    def pid(self) -> int | None:
        """The pid that is named, None where none is."""
        text = self._text()
        named = Process.parse(text)
        return named.pid if named is not None else int(text) if text.isdecimal() else None

    def shown(self) -> str:
        """The process for people."""
        text = self._text()
        if text.isdecimal():  # all that is known of it
            return f"pid {text}"
        named = Process.parse(text)
        if named is None or (lives := named.lives()) is Lives.NO:
            return "pid unknown"
        return f"pid {named.pid}" if lives is Lives.YES else f"pid {named.pid} in another container"

    @property
    def command_line(self) -> list[str]:
        """The words that the process was started with; none where it does not live here."""
        named = Process.parse(self._text())
        if named is not None and named.lives() is Lives.YES:
            with suppress(psutil.Error):
                return psutil.Process(named.pid).cmdline()
        return []

    def end_leftover(self, home: Path, *, word: str | None = None) -> None:
        """Ends the process if it still is the one that was named and is this home's, and removes the file.

        It is this home's if it was started with BATCHMILL_HOME, has the folder as its current one, or has this word
        in its command line.
        """
        named = Process.parse(self._text())
        if named is not None and named.lives() is Lives.YES:
            with suppress(psutil.Error):  # it has just ended, or is another user's
                process = psutil.Process(named.pid)
                if named.lives() is Lives.YES and _is_of(process, home, word):
                    _end(process)
        self.remove()

    def _text(self) -> str:
        try:
            return self._path.read_text().strip()
        except (OSError, ValueError):
            return ""


def _is_of(process: psutil.Process, home: Path, word: str | None) -> bool:
    if word is not None and re.search(rf"(?<![^\s:]){re.escape(word)}(?!\S)", " ".join(process.cmdline())):
        return True
    # A server may write its title over its environment.
    folders = (process.environ().get("BATCHMILL_HOME"), process.cwd())
    return any(each and os.path.realpath(each) == os.path.realpath(home) for each in folders)


def _end(process: psutil.Process) -> None:
    """Asks a process to end, and kills it when it has not ended in time; psutil checks its start before each signal."""
    process.terminate()
    try:
        process.wait(_END_SECONDS)
    except psutil.TimeoutExpired:
        process.kill()
