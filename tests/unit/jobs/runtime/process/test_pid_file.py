"""Files that name a process: what a dead mill left running is ended, and nobody else's process ever is."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import redis

from batchmill.jobs.broker.embedded import EmbeddedRedis
from batchmill.jobs.runtime.process.pid_file import PidFile
from batchmill.jobs.runtime.process.process import Lives, Process

#: Contents of a pid file that no longer name the live process, by their kind.
STALE: dict[str, Callable[[Process], object]] = {
    "its pid alone": lambda live: live.pid,
    "an earlier start": lambda live: replace(live, start_ticks=live.start_ticks - 1),
    "an earlier boot": lambda live: replace(live, boot_id="00000000-0000-0000-0000-000000000000"),
    "another namespace": lambda live: replace(live, namespace=1),
    "a newer batchmill's form": lambda live: f"2.{live}",
    "nothing": lambda _live: "",
}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    path = tmp_path / "home"
    path.mkdir()
    return path


@pytest.fixture
def foreign(tmp_path: Path) -> Iterator[EmbeddedRedis]:
    """The Redis of another home."""
    path = tmp_path / "other" / "home"
    path.mkdir(parents=True)
    server = EmbeddedRedis(path)
    server.start()
    yield server
    server.stop()


def server_of(home: Path) -> Process:
    """The Redis that listens in this home."""
    with redis.Redis(unix_socket_path=str(home / "redis.sock")) as client:
        process = Process.of(client.info("server")["process_id"])
    assert process is not None
    return process


def start(home: Path, *words: str) -> subprocess.Popen[bytes]:
    """A process that was started for this home, with the command line of a worker."""
    command = [sys.executable, "-c", "import time; time.sleep(600)", "-m", "batchmill.worker", *words]
    return subprocess.Popen(command, env=os.environ | {"BATCHMILL_HOME": str(home)})


def end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


@pytest.mark.parametrize("written", STALE.values(), ids=STALE)
def test_a_process_that_only_has_the_pid_is_left_alone(home: Path, written: Callable[[Process], object]) -> None:
    process = start(home)
    live = Process.of(process.pid)
    assert live is not None
    (home / "worker.pid").write_text(f"{written(live)}\n")
    PidFile(home / "worker.pid").end_leftover(home)
    assert process.poll() is None
    assert not (home / "worker.pid").exists()
    end(process)


def test_a_foreign_redis_whose_pid_stands_in_our_file_survives(home: Path, foreign: EmbeddedRedis) -> None:
    theirs = server_of(home.parent / "other" / "home")
    ours = EmbeddedRedis(home)
    for text in (theirs.pid, theirs):
        (home / "redis.pid").write_text(f"{text}\n")
        ours.start()
        assert server_of(home.parent / "other" / "home") == theirs
        ours.stop()


def test_the_worker_of_another_home_survives(home: Path) -> None:
    process = start(home.parent / "another")
    PidFile(home / "worker.pid").write(process.pid)
    PidFile(home / "worker.pid").end_leftover(home)
    assert process.poll() is None
    end(process)


def test_what_a_killed_mill_of_this_home_left_is_ended(home: Path) -> None:
    process = start(home)
    live = Process.of(process.pid)
    PidFile(home / "worker.pid").write(process.pid)
    PidFile(home / "worker.pid").end_leftover(home)
    assert live is not None
    assert live.lives() is Lives.NO
    process.wait()
    killed = EmbeddedRedis(home)
    killed.start()
    left = psutil.Process(server_of(home).pid)
    after = EmbeddedRedis(home)
    after.start()
    assert not left.is_running() or left.status() == psutil.STATUS_ZOMBIE
    assert server_of(home).pid != left.pid
    killed.stop()
    after.stop()


def test_it_says_who_holds_it_as_far_as_that_is_known(home: Path) -> None:
    file, path = PidFile(home / "mill.pid"), home / "mill.pid"
    assert file.shown() == "pid unknown"
    file.write(os.getpid())
    assert file.shown() == f"pid {os.getpid()}"
    live = Process.parse(path.read_text())
    assert live is not None
    shown = {}
    for name, written in STALE.items():
        path.write_text(f"{written(live)}\n")
        shown[name] = file.shown()
    assert shown.pop("its pid alone") == f"pid {live.pid}"
    assert shown.pop("another namespace") == f"pid {live.pid} in another container"
    assert set(shown.values()) == {"pid unknown"}


def test_of_a_pid_alone_nothing_is_concluded(home: Path) -> None:
    file = PidFile(home / "mill.pid")
    assert file.lives is Lives.NO
    file.write(os.getpid())
    assert file.lives is Lives.YES
    (home / "mill.pid").write_text(f"{os.getpid()}\n")
    assert file.lives is Lives.UNKNOWN
