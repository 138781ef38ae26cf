"""The log files of this machine's workers: found by worker or job, merged by time, filtered, followed."""

from __future__ import annotations

import heapq
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import click

from batchmill.jobs.configuration.settings import Settings
from batchmill.jobs.errors import NotFound
from batchmill.jobs.runtime.log_file import log_path, logs_folder, older_files, worker_of

_LEVELS = ("debug", "info", "warning", "error", "critical")
#: The beginning of a line of log_format=console.
_CONSOLE = re.compile(r"(\S+Z) \[(\w+)\s*\]")
_POLL_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Chosen:
    """The choice of the lines to show: of one worker or of all, about one job or all, from a level on."""

    folder: Path
    file: Path | None = None
    job_id: str | None = None
    level: str | None = None

    def nothing(self) -> str:
        """The sentence that there are no such lines."""
        who = "no worker of this machine has" if self.file is None else f"worker {worker_of(self.file)} has not"
        level = "" if self.level is None else f" of level {self.level} or above"
        about = "" if self.job_id is None else f" about job {self.job_id}"
        rest = "" if self.job_id is None else "; `batchmill logs` shows all of their lines"
        return f"{who} said anything{level}{about}{rest}"

    def paths(self) -> list[Path]:
        return sorted(self.folder.glob("*.log")) if self.file is None else [self.file]

    def takes(self, line: str, level: str | None, *, taken_before: bool) -> bool:
        """True for a line to show. One without a level belongs to the line before, as those of a traceback do."""
        if level is None:
            return taken_before
        high = self.level is None or level not in _LEVELS or _LEVELS.index(level) >= _LEVELS.index(self.level)
        return high and (self.job_id is None or re.search(rf"\b{self.job_id}\b", line) is not None)


def choose(which: str | None, *, level: str | None, settings: Settings) -> Chosen:
    """The lines that a user asked for, by a worker's name or id, or by a job. Raises NotFound."""
    folder = logs_folder(settings.home)
    if not any(folder.glob("*.log")):
        start = "up" if settings.embedded_broker else "worker"
        raise NotFound(f"no worker of this machine has left a log in {folder}; `batchmill {start} -m MODEL` starts one")
    if which is None:
        return Chosen(folder, level=level)
    if (path := log_path(settings.home, which)).exists():
        return Chosen(folder, file=path, level=level)
    return _by_store(which, folder, level=level, settings=settings)


def _by_store(which: str, folder: Path, *, level: str | None, settings: Settings) -> Chosen:
    from batchmill.migrations.revisions import open_store

    store = open_store(settings)
    try:
        if which.isdecimal():
            names = [row.name for row in store.workers.rows(only_alive=False) if row.id == int(which)]
            if names and (path := log_path(settings.home, names[0])).exists():
                return Chosen(folder, file=path, level=level)
        return Chosen(folder, job_id=store.jobs.find(which), level=level)
    except NotFound as error:
        raise NotFound(f"no worker {which!r} has a log in {folder}, and {error}") from None
    finally:
        store.close()


def show(chosen: Chosen, *, follow: bool) -> None:
    """Prints the lines, oldest first; with `follow`, new ones too, until Ctrl-C."""
    files: dict[Path, WorkerLog] = {}
    shown = 0
    with ExitStack() as stack:
        while True:
            for path in chosen.paths():
                if path not in files:
                    files[path] = stack.enter_context(closing(WorkerLog(path, chosen)))
            shown += _print_new(list(files.values()))
            if not follow:
                break
            time.sleep(_POLL_SECONDS)
    if not shown:
        click.echo(chosen.nothing(), err=True)


def _print_new(files: list[WorkerLog]) -> int:
    printed = 0
    for entry in heapq.merge(*(each.new() for each in files), key=lambda each: each.time):
        click.echo(f"{entry.worker}: {entry.line}" if len(files) > 1 and not entry.line.startswith("{") else entry.line)
        printed += 1
    return printed


class LogLine(NamedTuple):
    """One line of a worker's log."""

    time: str
    worker: str
    line: str


class WorkerLog:
    """One worker's file, with the older ones that it was rotated to; each line is read once."""

    def __init__(self, path: Path, chosen: Chosen) -> None:
        self._path = path
        self._chosen = chosen
        self._open: BinaryIO | None = None
        #: The beginning of a line whose end is not written yet.
        self._begun = b""
        self._time, self._taken = "", chosen.job_id is None

    def new(self) -> Iterator[LogLine]:
        """The lines that were written since the last call and are to be shown."""
        for raw in self._raw():
            line = raw.decode(errors="replace").rstrip("\n")
            stamp, level = _head(line)
            self._time = stamp or self._time
            self._taken = self._chosen.takes(line, level, taken_before=self._taken)
            if self._taken:
                yield LogLine(self._time, worker_of(self._path), line)

    def close(self) -> None:
        if self._open is not None:
            self._open.close()

    def _raw(self) -> Iterator[bytes]:
        if self._open is None:
            with suppress(FileNotFoundError):  # of a worker that has just been found to be one of the oldest
                self._open = self._path.open("rb")
                yield from self._older(self._open)
        if self._open is None:
            return
        yield from self._rest(self._open)
        if self._is_rotated(self._open):
            yield from self._rest(self._open)  # what was added between the end and the rotation
            self._open.close()
            self._open = self._path.open("rb")
            yield from self._rest(self._open)

    def _older(self, newest: BinaryIO) -> Iterator[bytes]:
        """The lines of the rotated files, oldest first. The newest file may be among them by now; it is left out."""
        with ExitStack() as stack:
            files = []
            for path in older_files(self._path):
                with suppress(FileNotFoundError):
                    files.append(stack.enter_context(path.open("rb")))
            for file in reversed(files):
                if not os.path.samestat(os.fstat(file.fileno()), os.fstat(newest.fileno())):
                    yield from self._rest(file)

    def _rest(self, file: BinaryIO) -> Iterator[bytes]:
        for piece in file:
            line = self._begun + piece
            if not line.endswith(b"\n"):
                self._begun = line
                return
            self._begun = b""
            yield line

    def _is_rotated(self, file: BinaryIO) -> bool:
        try:
            return not os.path.samestat(os.stat(self._path), os.fstat(file.fileno()))
        except FileNotFoundError:  # between two steps of the rotation
            return False


def _head(line: str) -> tuple[str | None, str | None]:
    """The time and level of a line; None for both where it is no line of a log."""
    if line.startswith("{"):
        try:
            fields = json.loads(line)
        except ValueError:
            return None, None
        return fields.get("timestamp"), fields.get("level")
    match = _CONSOLE.match(line)
    return (match[1], match[2]) if match else (None, None)
