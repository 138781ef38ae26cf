"""A long wait is reported, with its reason, its begin and the holder; a short one is not."""

from __future__ import annotations

import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from queue import Queue

import pytest

from batchmill.jobs.broker import embedded
from batchmill.jobs.broker.embedded import EmbeddedRedis
from batchmill.jobs.configuration.settings import load_settings
from batchmill.jobs.errors import BatchmillError, StoreBusy
from batchmill.jobs.models.digests import Digests
from batchmill.jobs.runtime import waiting
from batchmill.jobs.runtime.home import use_store
from batchmill.jobs.runtime.process.pid_file import PidFile
from batchmill.jobs.runtime.waiting import telling
from batchmill.jobs.store.database.database import WAL_SAFE_SINCE
from batchmill.jobs.store.store import Store
from batchmill.producer.cli.local.workers import LocalWorkers
from batchmill.worker.devices.lock import DeviceLock
from tests.support.processes.holding import file_lock, reader, transaction
from tests.support.store import mill

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="no other system tells who holds a lock")


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Queue[str]:
    """The lines that waits report, where a moment counts as long."""
    lines: Queue[str] = Queue()
    monkeypatch.setattr(waiting, "FIRST_SECONDS", 0.2)
    monkeypatch.setattr(waiting, "_LOOK_SECONDS", 0.02)
    monkeypatch.setattr(waiting, "_speak", lines.put)
    return lines


def first(lines: Queue[str]) -> str:
    return re.sub(r"\d\d:\d\d:\d\d UTC \(\d+ s\)", "TIME", lines.get(timeout=300))


def in_thread(call: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=call)
    thread.start()
    return thread


def test_a_wait_of_up_to_two_seconds_is_a_short_one() -> None:
    assert waiting.FIRST_SECONDS == 2.0


def test_a_wait_is_told_of_more_and_more_seldom(told: Queue[str]) -> None:
    with telling("Godot"):
        lines = [told.get(timeout=300) for _ in range(3)]
    assert all(re.fullmatch(r"waiting since \d\d:\d\d:\d\d UTC \(\d+ s\) for Godot", each) for each in lines)
    since = {each.split()[2] for each in lines}
    assert len(since) <= 2, "rounding apart, it is one time"


def test_a_wait_in_vain_goes_on_with_the_next_for_the_same(told: Queue[str]) -> None:
    begun = []

    def in_vain(what: str, *, seen: bool) -> None:
        with telling(what):
            begun.extend([told.get(timeout=300)] if seen else [])
            raise TimeoutError

    with pytest.raises(TimeoutError):
        in_vain("Godot", seen=True)
    assert "Godot" in waiting._vain
    with telling("Godot") as wait:
        assert told.get(timeout=300).split()[:3] == begun[0].split()[:3], "since the same time"
        wait.works()
    assert "Godot" not in waiting._vain
    with pytest.raises(TimeoutError):
        in_vain("nobody", seen=False)
    assert "nobody" not in waiting._vain


def test_one_that_is_over_in_time_is_not(told: Queue[str]) -> None:
    for _ in range(1_000):
        with telling("nothing much"):
            pass
    with telling("the end"):
        assert first(told) == "waiting since TIME for the end"
    assert told.empty()


def test_what_does_not_certainly_wait_is_told_of_only_with_its_holder(told: Queue[str]) -> None:
    holders: list[str] = []
    with telling("one", holder=lambda: holders[0] if holders else None, is_certain=False), telling("two"):
        assert first(told).endswith("for two")
        holders.append("pid 7")
        while not (line := first(told)).endswith("for one, which is locked by pid 7"):
            assert line.endswith("for two")


def test_after_long_idleness_it_is_told_of_as_well(told: Queue[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "_IDLE_LOOKS", 1)
    for _ in range(3):
        with telling("it"):
            first(told)
        while waiting._watch._is_looking.is_set():
            time.sleep(0.01)


def test_a_forked_child_tells_of_its_own_waits_alone(told: Queue[str]) -> None:
    with telling("its parent"):
        first(told)
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            waiting.tell_by(lambda line: os.write(writing, line.encode()))
            with telling("the child"):
                time.sleep(300)
        assert b"for the child" in os.read(reading, 1_000)
        os.kill(child, 9)
        os.waitpid(child, 0)


class TestTheStore:
    @pytest.mark.parametrize("begin", ["BEGIN IMMEDIATE", "BEGIN EXCLUSIVE"])
    def test_a_writer_that_waits_names_who_holds_the_lock(self, sqlite_url: str, told: Queue[str], begin: str) -> None:
        store = Store(sqlite_url, busy_seconds=300)
        path = Path(store.database.url.database or "")
        with transaction(path, begin) as pid:
            writing = in_thread(lambda: mill.load(store, 1))
            assert first(told) == f"waiting since TIME for the store sqlite:///{path}, which is locked by pid {pid}"
        writing.join()
        store.close()

    def test_so_does_a_reader(self, sqlite_url: str, told: Queue[str]) -> None:
        store = Store(sqlite_url, busy_seconds=300)
        with transaction(Path(store.database.url.database or ""), "BEGIN EXCLUSIVE") as pid:
            reading = in_thread(store.workers.rows)
            assert first(told).endswith(f", which is locked by pid {pid}")
        reading.join()
        store.close()

    @pytest.mark.skipif(sqlite3.sqlite_version_info >= WAL_SAFE_SINCE, reason="in WAL mode a reader is in nobody's way")
    def test_a_commit_that_waits_for_a_reader_names_it(self, sqlite_url: str, told: Queue[str]) -> None:
        store = Store(sqlite_url, busy_seconds=300)
        with reader(Path(store.database.url.database or "")) as pid:
            writing = in_thread(lambda: mill.begin(store))
            assert first(told).endswith(f", which is locked by pid {pid}")
        writing.join()
        store.close()

    def test_work_within_a_transaction_is_no_waiting(self, sqlite_url: str, told: Queue[str]) -> None:
        store = Store(sqlite_url)
        for transact in (store.database.read, store.database.write):
            with transact(), telling("nothing else"):
                assert first(told) == "waiting since TIME for nothing else"
        assert told.empty()
        store.close()

    def test_a_busy_store_names_who_holds_it(self, sqlite_url: str) -> None:
        store = Store(sqlite_url, busy_seconds=0.1)
        with transaction(Path(store.database.url.database or "")) as pid, pytest.raises(StoreBusy) as caught:
            mill.load(store, 1)
        assert f"is locked by pid {pid} (database is locked); try again" in str(caught.value)
        assert caught.value.hindrance == f"the store is locked by pid {pid}"
        store.close()


class TestFiles:
    def test_the_lock_of_a_device(self, tmp_path: Path, told: Queue[str]) -> None:
        lock = DeviceLock("GPU-1", folder=tmp_path)
        path = tmp_path / "batchmill-GPU-1.lock"
        with file_lock(path) as pid:
            taking = in_thread(lock.take)
            assert first(told) == (
                f"waiting since TIME for {path}, the lock of the device GPU-1, which is locked by pid {pid}"
            )
        taking.join()
        lock.give()

    def test_the_lock_of_who_hashes_a_folder(self, tmp_path: Path, told: Queue[str]) -> None:
        folder, home = tmp_path / "model", tmp_path / "home"
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        digests = Digests(home)
        digests.of(folder, ["config.json"])
        (remembered,) = (home / "digests").glob("*.lock")
        for file in (home / "digests").glob("*.json"):
            file.unlink()
        with file_lock(remembered) as pid:
            hashing = in_thread(lambda: digests.of(folder, ["config.json"]))
            line = first(told)
        hashing.join()
        assert line.endswith(f"{remembered}, the lock of who hashes a folder's files, which is locked by pid {pid}")

    def test_the_lock_of_who_makes_a_store(self, tmp_path: Path, told: Queue[str]) -> None:
        def use() -> None:
            with use_store(tmp_path):
                pass

        with file_lock(tmp_path / "store.lock") as pid:
            using = in_thread(use)
            assert first(told).endswith(f"store.lock, the lock of who makes the store, which is locked by pid {pid}")
        using.join()


def test_waits_cost_no_import_of_the_database() -> None:
    code = "import sys, batchmill.jobs.runtime.waiting; print('sqlalchemy' in sys.modules, 'click' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"


class TestTheMill:
    """Stopped processes stand for slow ones."""

    def ends_late(self, stop: Callable[[], None], named: Path, told: Queue[str]) -> str:
        pid = PidFile(named).pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        stopping = in_thread(stop)
        line = first(told)
        os.kill(pid, signal.SIGCONT)
        stopping.join()
        return line

    def test_redis_starts_and_ends(self, tmp_path: Path, told: Queue[str], monkeypatch: pytest.MonkeyPatch) -> None:
        redis = EmbeddedRedis(tmp_path)
        redis.start()
        assert (
            self.ends_late(redis.stop, tmp_path / "redis.pid", told)
            == "waiting since TIME for the embedded Redis to end"
        )
        slow = tmp_path / "slow-server"
        slow.write_text("#!/bin/sh\nsleep 2\nexit 1\n")
        slow.chmod(0o700)
        monkeypatch.setattr(embedded, "find_server", lambda: slow)
        with pytest.raises(BatchmillError):
            redis.start()
        assert first(told) == "waiting since TIME for the embedded Redis to start"

    def test_the_worker_ends(self, tmp_path: Path, told: Queue[str]) -> None:
        with (tmp_path / "worker.log").open("wb") as log:
            workers = LocalWorkers(
                mill.ECHO_SPEC, devices=["cpu"], words=[], settings=load_settings(home=tmp_path), log=log
            )
        assert self.ends_late(workers.stop, tmp_path / "worker.pid", told) == "waiting since TIME for the worker to end"
