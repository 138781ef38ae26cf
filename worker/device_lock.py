"""One worker per GPU: a lock per GPU UUID, held by the process that holds the model, for as long as it lives.

It is the machine's, not a home's. Devices without a UUID (the CPU) are shared freely.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from filelock import FileLock, Timeout

from jobs.errors import AlreadyRunning

#: A process that was just killed may take so long to let go of its device.
_PATIENCE_SECONDS = 5.0


class DeviceLock:
    """Taken once, and given back by the end of the process."""

    def __init__(self, device_uuid: str, *, folder: Path | None = None) -> None:
        folder = folder or Path(tempfile.gettempdir())
        self._uuid = device_uuid
        self._pid_file = folder / f"batchmill-{device_uuid}.pid"
        self._lock = FileLock(folder / f"batchmill-{device_uuid}.lock", timeout=_PATIENCE_SECONDS, mode=0o666)

    def take(self) -> None:
        """Raises AlreadyRunning, which names the process that works on this device."""
        try:
            self._lock.acquire()
        except (Timeout, PermissionError):
            pid = self._pid_file.read_text().strip() if self._pid_file.exists() else "unknown"
            raise AlreadyRunning(
                f"another worker holds the device {self._uuid} (pid {pid}): stop it, choose another --device, "
                "or start this one with --share-device"
            ) from None
        self._pid_file.write_text(f"{os.getpid()}\n")
