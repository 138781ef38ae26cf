"""The line of a SQLite file's writers: nobody is overtaken, and whoever cannot stand in it writes all the same."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from time import monotonic, sleep

import pytest
from sqlalchemy import event

from batchmill.jobs.store.database.database import Database
from batchmill.jobs.store.database.line import WriterLine
from batchmill.jobs.store.jobs import close, retry
from batchmill.jobs.store.jobs.create import MAX_REQUESTS
from batchmill.jobs.store.store import Store
from tests.support.store import mill

_PROCESSES = 6
_TURNS = 15
_MANY = 20_000
_START = multiprocessing.get_context("spawn")


def test_who_came_first_goes_first(tmp_path: Path) -> None:
    path, began = tmp_path / "line", []

    def wait(place: int) -> None:
        with WriterLine(path, most_seconds=60).head():
            began.append(place)

    with WriterLine(path, most_seconds=60).head():
        threads = []
        for place in range(8):
            last = path.read_bytes()
            threads.append(threading.Thread(target=wait, args=(place,)))
            threads[-1].start()
            while path.read_bytes() == last:  # until it has its place
                sleep(0.001)
        assert began == []
    for thread in threads:
        thread.join()
    assert began == list(range(8))


def test_one_who_never_leaves_the_line_keeps_nobody_for_ever(tmp_path: Path) -> None:
    with ExitStack() as all_at_its_head:
        for _ in range(3):
            all_at_its_head.enter_context(WriterLine(tmp_path / "line", most_seconds=0.05).head())


@pytest.mark.parametrize("line", ["no/such/folder", "folder", "link"])
def test_who_cannot_use_the_line_goes_on_without(tmp_path: Path, line: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "target").write_text("somebody's")
    (tmp_path / "link").symlink_to("target")
    with WriterLine(tmp_path / line, most_seconds=60).head():
        pass
    assert (tmp_path / "target").read_text() == "somebody's"


def test_what_was_left_in_its_file_does_no_harm(tmp_path: Path) -> None:
    for left in (b"\xff" * 8, b"somebody's", b""):
        (tmp_path / "line").write_bytes(left)
        with WriterLine(tmp_path / "line", most_seconds=60).head():
            pass
    assert (tmp_path / "line").stat().st_size < 100


def _take_turns(url: str, turns: Synchronized[int], start: threading.Barrier, told: Callable[[int], None]) -> None:
    """Writes page after page; tells the most pages of others that came between a wish and its turn."""
    database, most = Database(url, busy_seconds=60), 0
    start.wait()
    for _ in range(_TURNS):
        wished = turns.value
        with database.write():
            most = max(most, turns.value - wished)
            turns.value += 1
            sleep(0.02)
    database.close()
    told(most)


def test_six_processes_that_write_all_the_time_take_turns(sqlite_url: str) -> None:
    turns, start, told = _START.Value("q", 0), _START.Barrier(_PROCESSES), _START.SimpleQueue()
    arguments = (sqlite_url, turns, start, told.put)
    processes = [_START.Process(target=_take_turns, args=arguments) for _ in range(_PROCESSES)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    overtaken = [told.get() for _ in processes]
    assert turns.value == _PROCESSES * _TURNS
    assert max(overtaken) < 3 * _PROCESSES


@pytest.mark.parametrize("paged", ["retry", "cancel"])
def test_a_small_submit_gets_in_between_two_pages(sqlite_url: str, monkeypatch: pytest.MonkeyPatch, paged: str) -> None:
    store = Store(sqlite_url, busy_seconds=60)
    job_id = mill.load(store, 1_000, batch_size=5)
    if paged == "retry":
        store.closing.cancel(job_id)
    monkeypatch.setattr(retry, "PAGE_REQUESTS", 10)
    monkeypatch.setattr(close, "PAGE_REQUESTS", 10)
    command = store.retries.retry if paged == "retry" else store.closing.cancel
    long_one = threading.Thread(target=command, args=(job_id,))
    long_one.start()
    for _ in range(3):
        mill.load(store, 5)
    assert long_one.is_alive()  # a hundred pages, of which few have gone by
    long_one.join()
    store.close()


def _work(url: str, work: str, job_id: str, start: threading.Barrier, told: Callable[[float], None]) -> None:
    """One command on a big job, or many small ones; tells the longest that a transaction of it waited to begin."""
    store, asked, waited = Store(url, busy_seconds=60), [0.0], [0.0]
    engine = store.database._engine
    event.listen(engine, "begin", lambda _connection: asked.append(monotonic()), insert=True)
    event.listen(engine, "begin", lambda _connection: waited.append(monotonic() - asked[-1]))
    start.wait()
    if work == "retry":
        store.retries.retry(job_id)
    elif work == "cancel":
        store.closing.cancel(job_id)
    elif work == "discard":
        store.creation.discard(job_id)
    elif work == "submit":
        job_id = mill.begin(store, batch_size=64)
        for first in range(0, _MANY, MAX_REQUESTS):
            page = mill.prompts(MAX_REQUESTS, first=first)
            store.creation.add(job_id, prompts=page, batch_size=64, lease_seconds=mill.LEASE_SECONDS)
    else:
        for _ in range(20):
            store.closing.cancel(mill.load(store, 5))
    store.close()
    told(max(waited))


@pytest.mark.slow
def test_nobody_waits_for_two_seconds_beside_five_who_write_all_the_time(sqlite_url: str) -> None:
    store, jobs = Store(sqlite_url), {}
    for work in ("retry", "cancel", "discard"):
        jobs[work] = mill.begin(store, batch_size=64)
        for first in range(0, _MANY, MAX_REQUESTS):
            page = mill.prompts(MAX_REQUESTS, first=first)
            store.creation.add(jobs[work], prompts=page, batch_size=64, lease_seconds=600)
        if work != "discard":
            opened = {"spec": mill.ECHO_SPEC, "file_sha256": "0" * 64, "fingerprint": "f", "lease_seconds": 600.0}
            store.creation.open(jobs[work], **opened)  # type: ignore[arg-type]
    store.closing.cancel(jobs["retry"])
    store.close()
    start, told = _START.Barrier(6), _START.SimpleQueue()
    processes = [
        _START.Process(target=_work, args=(sqlite_url, work, jobs.get(work, ""), start, told.put))
        for work in ("retry", "cancel", "discard", "submit", "small ones", "small ones")
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    waits = [told.get() for _ in processes]
    assert max(waits) < 2, waits
