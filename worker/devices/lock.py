"""One worker per GPU: a lock per GPU UUID, held by the process that holds the model, for as long as it lives.

It is the machine's, not a home's: `/run/lock`, which a service with a private `/tmp` shares with others, or else the
folder for temporary files. Devices without a UUID (the CPU) are shared freely.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from filelock import FileLock, Timeout

from batchmill.jobs.errors import AlreadyRunning
from batchmill.jobs.runtime.files.locks import acquire
from batchmill.jobs.runtime.process.pid_file import PidFile

_MACHINES_FOLDER = Path("/run/lock")
#: A process that was just killed may take so long to let go of its device.
_PATIENCE_SECONDS = 5.0
_REMEDY = "stop it, choose another --device, or start this one with --share-device"


class DeviceLock:
    """A lock that is taken once, and given back by `give` or by the end of the process."""

    def __init__(self, device_uuid: str, *, folder: Path | None = None) -> None:
        folder = folder or _folder()
        self._uuid = device_uuid
        name = device_uuid.replace("/", "_")  # older UUIDs of parts of a GPU have slashes
        self._pid_file = PidFile(folder / f"batchmill-{name}.pid")
        self._path = folder / f"batchmill-{name}.lock"
        self._lock = FileLock(self._path, timeout=_PATIENCE_SECONDS, mode=0o666)

    def take(self) -> None:
        """Takes the lock. Raises AlreadyRunning, which names the process that works on this device."""
        try:
            acquire(self._lock, f"the device {self._uuid}")
        except Timeout:
            holder = self._pid_file.shown()
            raise AlreadyRunning(f"another worker holds the device {self._uuid} ({holder}): {_REMEDY}") from None
        except PermissionError:
            raise AlreadyRunning(
                f"another user's worker holds, or has held, the device {self._uuid}: {_REMEDY}; "
                f"if there is none, delete {self._path}"
            ) from None
        self._pid_file.write(os.getpid())

    def give(self) -> None:
        """Gives the lock back; one that is not held stays as it is."""
        self._lock.release()


class DeviceLocks:
    """The locks of several devices: all or none, and always in one order, so that no processes deadlock."""

    def __init__(self, device_uuids: Iterable[str], *, folder: Path | None = None) -> None:
        self._locks = [DeviceLock(each, folder=folder) for each in sorted(set(device_uuids))]

    def take(self) -> None:
        """Takes the locks. Raises AlreadyRunning, which names the process that holds one; then none is taken."""
        for place, lock in enumerate(self._locks):
            try:
                lock.take()
            except AlreadyRunning:
                for held in self._locks[:place]:
                    held.give()
                raise


def _folder() -> Path:
    return _MACHINES_FOLDER if os.access(_MACHINES_FOLDER, os.W_OK) else Path(tempfile.gettempdir())
