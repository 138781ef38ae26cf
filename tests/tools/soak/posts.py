"""The workers of a soak, and who starts them again when they have ended: a supervisor as systemd is one.

A post is a place for a worker, whose processes come and go. It knows the worker's row only where the store answers.
"""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from time import monotonic

import psutil
from sqlalchemy import text

from batchmill.jobs.broker.embedded import start_process
from batchmill.jobs.errors import StoreError
from tests.tools.soak.worker import HOST_VARIABLE
from tests.tools.soak.world import World

RESTART_SECONDS = 1.0
_CONTAINER = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child=SIGKILL")
_KILL_SECONDS = 90.0


@dataclass(frozen=True, slots=True)
class Row:
    """The store's row of the worker that a post has now."""

    worker_id: int
    generation: int
    state: str
    child_pid: int | None


@dataclass(slots=True)
class Post:
    """One place.

    `host`: the name of another host that the worker takes itself to be on. `words`: further flags. `contained`: it
    has a pid namespace of its own, in which it is process 1.
    """

    world: World
    name: str
    host: str = ""
    words: tuple[str, ...] = ()
    contained: bool = False
    process: subprocess.Popen[bytes] | None = None
    starts: int = 0
    start_at: float = 0.0
    asked_to_end_at: float | None = None
    asked_phase: str = ""
    #: Seconds from SIGTERM to the exit, and in which phase.
    ends: list[tuple[float, str]] = field(default_factory=list)
    killed: bool = False

    def start(self) -> None:
        environ = self.world.environ() | ({HOST_VARIABLE: self.host} if self.host else {})
        line = [*_CONTAINER] if self.contained else []
        line += [sys.executable, "-m", "tests.tools.soak.worker", "-m", "echo", "--name", self.name, *self.words]
        with (self.world.logs / f"{self.name}.log").open("ab") as log:
            log.write(f"--- start {self.starts + 1} at {self.world.seconds:.1f} s\n".encode())
            log.flush()
            self.process = start_process(line, log=log, environ=environ, blocks_sigterm=True)
        self.starts += 1
        self.asked_to_end_at, self.killed = None, False

    def tick(self, *, restart: bool = True) -> None:
        """Sees whether the worker has ended, and starts it again when it is time."""
        if self.process is not None and self.process.poll() is not None:
            self._on_end(self.process.returncode)
        if self.process is None and restart and monotonic() >= self.start_at:
            self.start()
        if self.asked_to_end_at is not None and monotonic() - self.asked_to_end_at > _KILL_SECONDS:
            self.world.problem(f"{self.name} did not end {_KILL_SECONDS:.0f} s after SIGTERM; it is killed")
            self.kill()

    def _on_end(self, code: int) -> None:
        self.process = None
        self.start_at = max(self.start_at, monotonic() + RESTART_SECONDS)
        took = None
        if self.asked_to_end_at is not None:
            took = round(monotonic() - self.asked_to_end_at, 1)
            self.ends.append((took, self.asked_phase))
            self.asked_to_end_at = None
            if code != 0:
                self.world.problem(f"{self.name} ended with {code} after SIGTERM ({self.asked_phase})")
        elif not self.killed:
            self.world.note("gave up", worker=self.name, code=code)
        self.world.note(
            "ended",
            worker=self.name,
            code=code,
            after=took,
            phase=self.asked_phase,
            load=os.getloadavg()[0],
            aloud=False,
        )

    @property
    def alive(self) -> bool:
        """False as soon as it is killed: it may be there for a moment more, and hears nothing."""
        return self.process is not None and not self.killed and self.process.poll() is None

    def parent(self) -> psutil.Process | None:
        """The worker's own process, in a container the one that it was made for."""
        if not self.alive:
            return None
        assert self.process is not None
        with suppress(psutil.Error):
            outer = psutil.Process(self.process.pid)
            return next(iter(outer.children()), None) if self.contained else outer
        return None

    def child(self) -> psutil.Process | None:
        """The process that holds the model."""
        parent = self.parent()
        with suppress(psutil.Error):
            for each in parent.children() if parent else ():
                if "spawn_main" in " ".join(each.cmdline()):
                    return each
        return None

    def terminate(self) -> None:
        if (parent := self.parent()) is not None and self.asked_to_end_at is None:
            row = self.row()
            self.asked_phase = row.state if row else "store away or starting"
            self.asked_to_end_at = monotonic()
            with suppress(psutil.Error):
                parent.terminate()

    def kill(self) -> None:
        """The parent alone; in a container everything dies with it."""
        if self.process is not None:
            self.killed, self.asked_to_end_at = True, None
            self.process.kill()

    def rest(self, seconds: float) -> None:
        """No worker is started here for so long."""
        self.start_at = monotonic() + seconds

    def row(self) -> Row | None:
        """None while the store is away, or before the worker has a row."""
        if self.process is None:
            return None
        query = text(
            "SELECT id, generation, state, child_pid FROM workers WHERE name = :name AND pid = :pid ORDER BY id"
        )
        with suppress(StoreError), self.world.glance.database.read() as connection:
            pid = 1 if self.contained else self.process.pid
            found = connection.execute(query, {"name": self.name, "pid": pid}).all()
            return Row(*found[-1]) if found else None
        return None


def end_all(posts: list[Post]) -> None:
    """Ends every worker in order, and kills what is left of it."""
    for post in posts:
        post.terminate()
    while any(post.alive for post in posts):
        for post in posts:
            post.tick(restart=False)
        with suppress(subprocess.TimeoutExpired):
            next((post.process for post in posts if post.process), _NOBODY).wait(0.2)
    for post in posts:
        post.tick(restart=False)


class _Nobody:
    def wait(self, _seconds: float) -> None:
        return


_NOBODY = _Nobody()


def can_contain() -> bool:
    """True where this user may make pid namespaces."""
    try:
        return subprocess.run([*_CONTAINER, "true"], capture_output=True).returncode == 0
    except OSError:
        return False
