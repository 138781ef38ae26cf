"""Named points at which a trial makes a process die: `BATCHMILL_FAILPOINT=name=kill9@3`, and nothing otherwise.

The third time a process passes the point it is killed, as `kill -9` does (`kill9`), or gets the error of a full disk
(`full`). A home's failpoint fires once: a process that is started again passes the point unharmed. `note` does
nothing but write each passing down, so that a trial can see how many there are.
"""

from __future__ import annotations

import errno
import os
import re
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from batchmill.jobs.errors import SettingsError

#: Every point, and what has just happened there. A test visits each.
POINTS = {
    "submit.page": "a page of requests is stored, and the job is not open",
    "submit.opened": "the job is open, and no wake-up is sent",
    "wakeup.sent": "one wake-up of several is sent",
    "child.woken": "a task has begun, and nothing is claimed",
    "child.entered": "requests are recorded as in flight and enter the engine",
    "child.stepped": "the engine has answered, and the saver knows of nothing",
    "turn.saved": "outputs are inserted, and the turn is not committed",
    "turn.claimed": "batches are claimed, and the turn is not committed",
    "turn.committed": "a turn is committed, and the child knows nothing of it",
    "job.closing": "a job is closed, and the turn is not committed",
    "spool.written": "outputs are in the spool, and the store is away",
    "recovery.taken": "leases of the dead are taken back, and it is not committed",
    "reconciler.reaped": "leases are taken back, and no wake-up is sent",
    "export.written": "a part of the answers is written",
    "export.replaced": "the answers are whole, and not in their place",
}
_WRITTEN = re.compile(r"(?P<name>[a-z.]+)=(?P<action>kill9|full|note)@(?P<hit>[1-9][0-9]*)")


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _fill() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


_ACTIONS: dict[str, Callable[[], None]] = {"kill9": _kill, "full": _fill}
_NOTE = "note"


@dataclass(slots=True)
class _Armed:
    name: str
    action: str
    hits_left: int
    #: In home: shows that the point has fired, or lists the pids that passed it.
    file: Path


_armed: _Armed | None = None


def arm(written: str, *, home: Path) -> None:
    """Arms what the setting says, in this process. Raises SettingsError for a point or an action that is not there."""
    global _armed
    _armed = None
    if not written:
        return
    match = _WRITTEN.fullmatch(written)
    if match is None or match["name"] not in POINTS:
        raise SettingsError(
            f"BATCHMILL_FAILPOINT={written}: write name=kill9@1, name=full@1 or name=note@1, "
            f"the name one of {', '.join(POINTS)}"
        )
    _armed = _Armed(match["name"], match["action"], int(match["hit"]), home / f"failpoint.{match['name']}")


def failpoint(name: str) -> None:
    """Passes a point."""
    if _armed is not None and _armed.name == name:
        _hit(_armed)


def _hit(armed: _Armed) -> None:
    if armed.action == _NOTE:
        with armed.file.open("a") as file:
            file.write(f"{os.getpid()}\n")
        return
    armed.hits_left -= 1
    if armed.hits_left:
        return
    try:
        armed.file.touch(exist_ok=False)
    except FileExistsError:
        return
    _ACTIONS[armed.action]()
