"""The workers of a mill on this machine: one process, the supervisor, which starts and ends them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from batchmill.jobs.broker.embedded import start_process, stop_process
from batchmill.jobs.configuration.settings import Settings, environment_of
from batchmill.jobs.errors import BatchmillError
from batchmill.jobs.models.spec import ModelSpec
from batchmill.jobs.runtime.process.pid_file import PidFile
from batchmill.jobs.runtime.waiting import telling

#: The time that the supervisor gets before it is killed, beyond the workers' own drain and kill.
_STOP_MARGIN_SECONDS = 6.0
#: A worker that gives up says why and shows 15 lines of its children, and then its supervisor says one more.
_LAST_LOG_LINES = 25


class LocalWorkers:
    """The supervisor of this machine's workers, in a session of its own."""

    def __init__(
        self,
        spec: ModelSpec,
        *,
        devices: Sequence[str],
        words: Sequence[str],
        settings: Settings,
        log: IO[bytes],
    ) -> None:
        self._pid_file = PidFile(settings.home / "worker.pid")
        self._stop_seconds = settings.drain_seconds + _STOP_MARGIN_SECONDS
        self._pid_file.end_leftover(settings.home)
        arguments = [*spec.command_line()[2:], *words]
        self._process = start_process(
            [sys.executable, "-P", "-m", "batchmill.worker", *arguments, "--devices", ",".join(devices)],
            log=log,
            environ=os.environ | environment_of(settings),
            blocks_sigterm=True,
        )
        self._pid_file.write(self._process.pid)

    @property
    def failed(self) -> bool:
        return self._process.returncode not in (None, 0)

    def ended(self, seconds: float) -> bool:
        """Waits at most so long for the supervisor to end by itself."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        return self._process.returncode is not None

    def check(self, log_path: Path, begins_at: int) -> None:
        """Raises BatchmillError, with the worker's last lines, where it has ended before the job."""
        if self.ended(0.0):
            with log_path.open("rb") as log:
                log.seek(begins_at)
                lines = [line.decode(errors="replace").rstrip() for line in deque(log, maxlen=_LAST_LOG_LINES)]
            raise BatchmillError("\n".join(["the worker ended before the job did; its last lines:", *lines]))

    def stop(self) -> None:
        with telling("the worker to end"):
            stop_process(self._process, seconds=self._stop_seconds)
        self._pid_file.remove()
