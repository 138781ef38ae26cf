"""A log file that several processes add to and any of them rotates: NAME.log, and the older NAME.log.1 and NAME.log.2.

Each record is one write to the end of the file, which is open for no longer, so nothing that was logged is lost with
the process, and no process waits for another. What cannot be written is dropped: a log is not worth the work.
"""

from __future__ import annotations

import fcntl
import logging
import os
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from urllib.parse import quote, unquote

FILE_BYTES = 10 * 1024**2
_OLDER_FILES = 2
#: A file's name has at most 255 bytes, of which rotation takes some.
_LONGEST_STEM = 200


class LogFile(logging.Handler):
    """Adds records to the file, and rotates it when it has grown large."""

    def __init__(self, path: Path, *, file_bytes: int = FILE_BYTES) -> None:
        super().__init__()
        self._path = path
        self._file_bytes = file_bytes

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(Exception):  # a full disk, a folder that is gone: stderr is told all the same
            line = f"{self.format(record)}\n".encode(errors="backslashreplace")
            descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.write(descriptor, line)
            finally:
                os.close(descriptor)
            rotate_if_large(self._path, file_bytes=self._file_bytes)


def rotate_if_large(path: Path, *, file_bytes: int = FILE_BYTES) -> None:
    """Rotates the file unless it is small, or another process does so. Raises OSError."""
    with suppress(FileNotFoundError, BlockingIOError), path.open("rb") as file:
        if os.fstat(file.fileno()).st_size < file_bytes:
            return
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):  # else another process has done so by now
            newer = [path, *older_files(path)]
            for source, target in reversed(list(pairwise(newer))):
                with suppress(FileNotFoundError):
                    source.replace(target)


def logs_folder(home: Path) -> Path:
    """The folder of the workers' log files."""
    return home / "logs"


def log_path(home: Path, worker: str) -> Path:
    """The file of the worker that has this name."""
    return logs_folder(home) / f"{quote(worker, safe=' +')[:_LONGEST_STEM]}.log"


def worker_of(path: Path) -> str:
    """The name of the worker whose file this is."""
    return unquote(path.stem)


def older_files(path: Path) -> list[Path]:
    """The older files of this one, newest first, whether they are there or not."""
    return [path.with_name(f"{path.name}.{number}") for number in range(1, _OLDER_FILES + 1)]
