"""A process, told from every other that had or will have its pid: by its start, the boot and the pid namespace.

Every check whether another process lives is made here. Where the system tells none of this (elsewhere than on Linux),
or the process is of another pid namespace, as one of another container is, nothing is concluded.
"""

from __future__ import annotations

import os
import re
import signal
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

_PROC = Path("/proc")
#: The text of a process, in its first format.
_WRITTEN = re.compile(r"1\.([1-9][0-9]{0,9})\.([0-9]{1,20})\.([0-9a-f-]{36})\.([0-9]{1,20})")
#: In /proc/PID/stat, counted from behind the program's name: the state, and the start in ticks since the boot.
_STATE, _START = 0, 19
_ENDED_STATES = "ZX"


class Lives(StrEnum):
    """Answer to the question whether a process lives."""

    YES = "yes"
    NO = "no"
    UNKNOWN = "unknown"


class _Place(NamedTuple):
    """Realm of a pid: one boot of one machine, and one pid namespace in it."""

    boot_id: str
    namespace: int


def end_of(exit_code: int) -> str:
    """End of a process by its exit code, which is negative for a signal: `SIGKILL`, or `exit code 1`."""
    if exit_code >= 0:
        return f"exit code {exit_code}"
    try:
        return signal.Signals(-exit_code).name
    except ValueError:  # a real-time signal has no name
        return f"signal {-exit_code}"


@dataclass(frozen=True, slots=True)
class Process:
    """One process of a machine. Its start is counted in ticks since the boot, which no clock that is set moves."""

    pid: int
    start_ticks: int
    boot_id: str
    namespace: int

    @classmethod
    def own(cls) -> Process | None:
        """This process; None where the system does not tell."""
        return cls.of(os.getpid())

    @classmethod
    def of(cls, pid: int) -> Process | None:
        """The process that has this pid now; None where there is none, or the system does not tell."""
        place, seen = _here(), _seen(pid)
        return None if place is None or seen is None else cls(pid, seen[1], *place)

    @classmethod
    def parse(cls, text: str | None) -> Process | None:
        """The process of this text; None for any other, from which nothing can be concluded."""
        match = _WRITTEN.fullmatch((text or "").strip())
        return None if match is None else cls(int(match[1]), int(match[2]), match[3], int(match[4]))

    def __str__(self) -> str:
        return f"1.{self.pid}.{self.start_ticks}.{self.boot_id}.{self.namespace}"

    @property
    def is_of_this_boot(self) -> bool:
        """False for one of an earlier boot, and for one of another machine, which cannot be told apart."""
        place = _here()
        return place is not None and place.boot_id == self.boot_id

    def lives(self) -> Lives:
        """Tells if it lives. Ask for processes of this machine alone: one of another counts as of an earlier boot."""
        place = _here()
        if place is None:
            return Lives.UNKNOWN
        if place.boot_id != self.boot_id:
            return Lives.NO
        if place.namespace != self.namespace:
            return Lives.UNKNOWN
        seen = _seen(self.pid)
        if seen is None:
            return Lives.UNKNOWN if _is_hidden(self.pid) else Lives.NO
        state, start_ticks = seen
        return Lives.YES if start_ticks == self.start_ticks and state not in _ENDED_STATES else Lives.NO


def _here() -> _Place | None:
    try:
        boot_id = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
        namespace = re.fullmatch(r"pid:\[([0-9]+)\]", os.readlink(_PROC / "self/ns/pid"))
        is_our_proc = os.readlink(_PROC / "self") == str(os.getpid())  # it may show the pids of an outer namespace
    except OSError:
        return None
    return _Place(boot_id, int(namespace[1])) if namespace and is_our_proc else None


def _seen(pid: int) -> tuple[str, int] | None:
    """The state and the start of the process that has this pid; None where none can be seen."""
    try:
        stat = (_PROC / str(pid) / "stat").read_bytes()
    except OSError:
        return None
    words = stat.rpartition(b")")[2].split()  # the program's name, in parentheses, may hold anything
    return words[_STATE].decode(), int(words[_START])


def _is_hidden(pid: int) -> bool:
    """True where there is a process of this pid though it cannot be seen, as /proc may hide those of other users."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True
