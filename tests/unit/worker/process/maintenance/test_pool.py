"""The pool as the parent sees it: the end of a child is known, also while Celery takes note of it."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

from batchmill.worker.process.maintenance.pool import Pool, is_running


class Noted:
    """A process of which the system first tells Celery's thread."""

    looks = 0

    def poll(self) -> int | None:
        self.looks += 1
        return -9 if self.looks > 2 else None


def pool_of(processes: Any) -> Pool:
    return Pool(SimpleNamespace(pool=SimpleNamespace(_pool=processes)))


def test_the_end_of_a_child_that_celery_is_just_noting_is_waited_for() -> None:
    assert pool_of(SimpleNamespace(ends={2: Noted()})).ended_by(2) == "SIGKILL"


def test_nothing_is_known_of_the_end_of_an_unknown_child() -> None:
    assert pool_of(SimpleNamespace(ends={})).ended_by(2) is None
    assert pool_of(SimpleNamespace(ends={})).ended_by(None) is None


def test_a_pool_that_has_not_started_has_no_processes() -> None:
    assert Pool(SimpleNamespace()).pids() == []
    assert pool_of(SimpleNamespace(_pool=[SimpleNamespace(pid=7), SimpleNamespace(pid=None)])).pids() == [7]


def test_a_zombie_does_not_run() -> None:
    assert is_running(os.getpid())
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not is_running(child.pid)
    child.wait()
    assert not is_running(child.pid)
