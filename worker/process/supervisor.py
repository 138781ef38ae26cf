"""One worker process per placement, each restarted with a growing pause when it dies; ended together.

A worker whose model cannot be loaded is not started again. This module knows no Celery and no engine.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from time import monotonic

from batchmill.jobs.broker.embedded import start_process, wait_or_kill
from batchmill.jobs.configuration.settings import Settings, environment_of
from batchmill.jobs.errors import BatchmillError, StoreError, StoreReplaced
from batchmill.jobs.requests.states import WorkerState
from batchmill.jobs.runtime.logs import get_logger
from batchmill.jobs.runtime.process.process import Process, end_of
from batchmill.jobs.store.store import Store
from batchmill.worker.devices.placement import Placement

log = get_logger(__name__)
#: The name of the log file that tells of workers that ended and were started again.
SUPERVISOR = "supervisor"
_TICK_SECONDS = 0.2
_FIRST_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 60.0
#: A device that was sick is tried again after this time.
_SICK_PAUSE_SECONDS = 600.0
#: A worker that lived this long starts again after the first pause.
_HEALTHY_SECONDS = 300.0
#: This many processes in a row that end before they are in the store, in some fifteen seconds, are no accident.
_MOST_UNKNOWN = 5
#: The time that a worker gets beyond its drain before it is killed.
_KILL_MARGIN_SECONDS = 4.0


class _Post:
    """One device's place: the process that holds it now, and when the next may be started."""

    def __init__(self, device: str, command: Sequence[str], environ: Mapping[str, str]) -> None:
        self.device = device
        self._command = command
        self._environ = environ
        self._pause = _FIRST_PAUSE_SECONDS
        self._start_at = monotonic()
        self._started_at = 0.0
        self.process: subprocess.Popen[bytes] | None = None
        #: Tells the process that was started last from others of its pid.
        self.identity: Process | None = None
        #: The number of processes in a row that ended before they were in the store.
        self.unknown = 0
        self.over = False

    def start_if_due(self) -> None:
        if self.process is None and not self.over and monotonic() >= self._start_at:
            self.process = start_process(
                self._command, log=sys.stderr.buffer, environ=self._environ, blocks_sigterm=True
            )
            self.identity = Process.of(self.process.pid)
            self._started_at = monotonic()

    def rest(self, seconds: float) -> None:
        """Lets the next process start only after this time."""
        self._start_at = monotonic() + seconds

    def ended(self) -> tuple[int, int] | None:
        """The pid and exit code of a process that has ended since the last call."""
        if self.process is None or self.process.poll() is None:
            return None
        pid, code = self.process.pid, self.process.returncode
        self.process = None
        if monotonic() - self._started_at > _HEALTHY_SECONDS:
            self._pause = _FIRST_PAUSE_SECONDS
        self._start_at = monotonic() + self._pause
        self._pause = min(2 * self._pause, _LONGEST_PAUSE_SECONDS)
        return pid, code


class Supervisor:
    """Runs `python -m batchmill.worker` once per placement until told to end, or until no worker is left."""

    def __init__(
        self,
        placements: Sequence[Placement],
        arguments: Sequence[str],
        *,
        ends_when_idle: bool,
        settings: Settings,
        store: Store,
    ) -> None:
        environ = os.environ | environment_of(settings)
        self._posts = [
            _Post(
                each.written,
                [sys.executable, "-P", "-m", "batchmill.worker", *arguments, *each.command_line()],
                environ,
            )
            for each in placements
        ]
        self._ends_when_idle = ends_when_idle
        self._store = store
        self._drain_seconds = settings.drain_seconds
        self._asked_to_end = threading.Event()

    def run(self) -> None:
        """Runs all workers.

        Raises BatchmillError when all gave up, and StoreReplaced when one ended and the store is gone.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._asked_to_end.set())
        failed = 0
        try:
            while not self._asked_to_end.wait(_TICK_SECONDS) and not all(post.over for post in self._posts):
                for post in self._posts:
                    post.start_if_due()
                    failed += self._look_at(post)
        finally:
            self._end_all()
        if failed == len(self._posts):
            raise BatchmillError("no worker could be started; see the lines above")

    def _look_at(self, post: _Post) -> bool:
        """Sees to a worker that has ended. Returns True where it has just given up for good."""
        ended = post.ended()
        if ended is None:
            return False
        pid, code = ended
        if code == 0 and self._ends_when_idle:
            post.over = True
            return False
        if self._store.database.is_absent:
            raise StoreReplaced(f"the store {self._store.database.name} is gone, and no worker is started on it again")
        state = None
        with suppress(StoreError):  # the store is away: the next process of the worker gives up again, if it has to
            state = self._store.workers.gave_up(host=socket.gethostname(), pid=pid, process=post.identity)
        if state is WorkerState.FAILED or (code != 0 and self._cannot_begin(post)):
            post.over = True
            return True
        if state is WorkerState.SICK:
            post.rest(_SICK_PAUSE_SECONDS)
        log.warning(
            "a worker ended and is started again", device=post.device, pid=pid, exit_code=code, ended_by=end_of(code)
        )
        return False

    def _cannot_begin(self, post: _Post) -> bool:
        """True where the last processes of a post all ended before the store knew them, as by a failed import."""
        if post.identity is None:
            return False
        try:
            is_known = self._store.workers.knows(post.identity, within_seconds=_HEALTHY_SECONDS)
        except StoreError:
            return False
        post.unknown = 0 if is_known else post.unknown + 1
        if post.unknown < _MOST_UNKNOWN:
            return False
        log.error("a worker is not started again: it ends before it is in the store", device=post.device)
        return True

    def _end_all(self) -> None:
        running = [post.process for post in self._posts if post.process is not None]
        for process in running:
            process.send_signal(signal.SIGTERM)
        deadline = monotonic() + self._drain_seconds + _KILL_MARGIN_SECONDS
        for process in running:
            wait_or_kill(process, seconds=max(0.0, deadline - monotonic()))
