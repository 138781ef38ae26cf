"""The child's loop over a real store and the echo engine: a whole job without any process, and its edges."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from batchmill.jobs.errors import StoreUnavailable
from batchmill.jobs.models.device_memory import Memory
from batchmill.jobs.requests.request import RequestKey
from batchmill.jobs.requests.states import JobState, RequestState, WorkerState
from batchmill.jobs.store.leases.lease import SyncResult
from batchmill.jobs.store.store import Store
from batchmill.worker.engine.echo.engine import EchoEngine
from batchmill.worker.loop import saver
from batchmill.worker.loop.runner import Runner
from batchmill.worker.loop.saver import Saver
from batchmill.worker.loop.spool import Spool, read
from tests.integration.conftest import until
from tests.support.store import mill
from tests.support.store.oracle import violations


class Desk:
    """One child's saver, engine and runner, and its calls to the outside."""

    def __init__(self, store: Store, folder: Path, *, rows: int = 8, save_seconds: float = 0.05) -> None:
        self.session = mill.session(store)
        self.drain = threading.Event()
        self.woken = 0
        self.engine = EchoEngine(rows=rows, progress=self.progress)
        self.steps = 0
        self.on_step = lambda: None
        self.spool = Spool(folder / "spool" / "1.jsonl", limit_bytes=100_000)
        self.saver = Saver(
            store,
            self.session,
            rows=rows,
            admission_order=self.engine.admission_order,
            save_seconds=save_seconds,
            peak=lambda: Memory(1, 2, 3, 4),
            wake=self.wake,
            drain=self.drain,
            spool=self.spool,
            capacity_of="host/cpu",
        )
        self.saver.start()
        self.runner = Runner(self.engine, self.saver, watching=nullcontext)

    def progress(self) -> bool:
        self.steps += 1
        self.on_step()
        return self.drain.is_set()

    def wake(self) -> None:
        self.woken += 1


@pytest.fixture
def desk(store: Store, tmp_path: Path) -> Desk:
    return Desk(store, tmp_path)


def test_a_task_works_off_everything_and_ends(store: Store, desk: Desk) -> None:
    jobs = [mill.load(store, 50, batch_size=7), mill.load(store, 3)]
    desk.runner.run()
    for job_id in jobs:
        job = store.jobs.job(job_id)
        assert job.state is JobState.COMPLETED
        assert job.counts.succeeded == job.counts.total
    desk.runner.run()  # a wake-up that came late
    assert store.usage.of(jobs[0]).memory.peak_allocated_bytes == 2


def test_the_store_knows_how_far_the_answers_in_flight_are(
    store: Store, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = mill.load(store, 100, batch_size=100)
    monkeypatch.setattr(desk.engine, "tokens_so_far", lambda: {RequestKey(job_id, index): 3 for index in range(100)})

    def look() -> None:
        if desk.steps == 3:
            until(lambda: store.usage.of(job_id).paces[0].in_flight_tokens >= 3, "the tokens of some")

    desk.on_step = look
    desk.runner.run()
    assert store.usage.of(job_id).paces[0].in_flight_tokens == 0
    assert store.jobs.job(job_id).counts.succeeded == 100


def test_a_drain_saves_what_is_finished_and_hands_the_rest_back(store: Store, desk: Desk) -> None:
    job_id = mill.load(store, 100, batch_size=10)
    desk.on_step = lambda: desk.drain.set() if desk.steps == 3 else None
    desk.runner.run()
    done = store.jobs.job(job_id).counts.succeeded
    assert 0 < done < 100
    until(lambda: desk.woken == 1, "others are woken")  # by the saver, once all is committed
    assert mill.work_off(store, mill.session(store, name="next")) == 100 - done
    assert store.jobs.job(job_id).state is JobState.COMPLETED


def test_what_a_model_that_is_no_more_the_same_computed_is_not_saved(
    store: Store, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = mill.load(store, 100, batch_size=10)
    given: list[int] = []
    give = desk.saver.give

    def count(outputs: Any, **more: Any) -> None:
        given.append(len(outputs))
        give(outputs, **more)

    def is_whole() -> bool:
        if len(given) == 2:
            desk.drain.set()
        return len(given) < 2

    monkeypatch.setattr(desk.saver, "give", count)
    Runner(desk.engine, desk.saver, watching=nullcontext, is_whole=is_whole).run()
    assert len(given) == 2
    assert store.jobs.job(job_id).counts.succeeded == sum(given)
    assert mill.work_off(store, mill.session(store, name="next")) == 100 - sum(given)


def test_a_drain_in_the_workers_row_is_obeyed(store: Store, desk: Desk) -> None:
    mill.load(store, 10)
    store.registration.enter(desk.session.worker_id, WorkerState.DRAINING)
    desk.runner.run()
    assert desk.drain.is_set()
    assert desk.steps == 0


def test_a_cancel_in_mid_job_reaches_the_engine(store: Store, desk: Desk) -> None:
    job_id = mill.load(store, 100, batch_size=10)
    desk.on_step = lambda: store.closing.cancel(job_id) if desk.steps == 2 else None
    desk.runner.run()
    job = store.jobs.job(job_id)
    assert job.state is JobState.CANCELLED
    assert job.counts.pending == 0
    assert job.counts.cancelled > 0
    states = frozenset({RequestState.SUCCEEDED, RequestState.CANCELLED})
    written = [row.index for page in store.jobs.output_pages(job_id, states=states, page=7) for row in page]
    assert written == list(range(100))


def test_a_batch_taken_back_in_mid_job_is_dropped_and_done_again(store: Store, desk: Desk) -> None:
    job_id = mill.load(store, 40, batch_size=10)

    def take_back() -> None:
        if desk.steps == 2:
            store.recovery.take_back(desk.session.worker_id, generation=desk.session.generation)

    desk.on_step = take_back
    desk.runner.run()
    job = store.jobs.job(job_id)
    assert job.state is JobState.COMPLETED
    assert job.counts.succeeded == 40


def test_outputs_wait_while_the_store_is_away(store: Store, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = mill.load(store, 30)
    real, calls = store.leases.sync, iter(range(1_000))

    def sometimes(*args: object, **kwargs: object) -> object:
        if next(calls) % 3 == 1:
            raise StoreUnavailable("away")
        return real(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(store.leases, "sync", sometimes)
    desk.runner.run()
    assert store.jobs.job(job_id).counts.succeeded == 30


def test_it_reads_ahead_only_what_no_idle_worker_could_start(store: Store, desk: Desk) -> None:
    mill.load(store, 8, batch_size=4)
    mill.session(store, name="idle")
    held: list[int] = []
    desk.on_step = lambda: held.append(store.workers.rows()[0].leases)
    desk.runner.run()
    assert held
    assert max(held) == 1


def test_alone_it_reads_ahead_as_far_as_its_engine_has_rows(store: Store, desk: Desk) -> None:
    mill.load(store, 12, batch_size=4)
    held: list[int] = []
    desk.on_step = lambda: held.append(store.workers.rows()[0].leases)
    desk.runner.run()
    assert max(held) == 2


class Outage:
    """A store whose turns fail while it lasts, before or after their commit."""

    def __init__(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        self._turn = store.leases.sync
        self.on = False
        self.commits = False
        self.refused = 0
        monkeypatch.setattr(store.leases, "sync", self.turn)
        monkeypatch.setattr(saver, "_LONGEST_PAUSE_SECONDS", 0.3)

    def turn(self, *args: Any, **kwargs: Any) -> SyncResult:
        if not self.on:
            return self._turn(*args, **kwargs)
        self.refused += 1
        if self.commits:
            self._turn(*args, **kwargs)
        raise StoreUnavailable("away")


def test_the_engine_goes_on_with_what_is_claimed_and_the_spool_has_it(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(store, tmp_path, rows=4)
    job_id = mill.load(store, 40, batch_size=20)
    outage = Outage(store, monkeypatch)
    spooled: list[int] = []

    def on_step() -> None:
        outage.on = outage.on or desk.steps == 2
        if outage.on and (tmp_path / "spool" / "1.jsonl").exists():
            (held,) = read(tmp_path / "spool" / "1.jsonl")
            spooled.append(len(held.outputs))

    desk.on_step = on_step
    heal = threading.Timer(1.5, lambda: setattr(outage, "on", False))
    heal.start()
    desk.runner.run()
    heal.cancel()
    assert store.jobs.job(job_id).counts.succeeded == 40
    assert max(spooled) > 8  # more than what was in flight when the store went away
    assert not (tmp_path / "spool" / "1.jsonl").exists()
    assert violations(store) == []


def test_a_full_spool_makes_the_engine_wait(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(store, tmp_path, rows=4)
    desk.spool._limit_bytes = 700
    job_id = mill.load(store, 100, batch_size=50)
    outage = Outage(store, monkeypatch)
    desk.on_step = lambda: setattr(outage, "on", outage.on or desk.steps == 2)
    worker = threading.Thread(target=desk.runner.run)
    worker.start()
    until(lambda: outage.refused > 3, "the outage goes on")
    stopped_at = desk.steps
    until(lambda: outage.refused > 5, "and on")
    assert desk.steps == stopped_at < 20
    outage.on = False
    worker.join(30)
    assert store.jobs.job(job_id).counts.succeeded == 100
    assert violations(store) == []


def test_what_a_lost_answer_claimed_is_not_lost(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(store, tmp_path, rows=4)
    job_id = mill.load(store, 60, batch_size=5)
    outage = Outage(store, monkeypatch)
    outage.commits = True
    desk.on_step = lambda: setattr(outage, "on", desk.steps % 3 == 0)
    worker = threading.Thread(target=desk.runner.run)
    worker.start()
    while worker.is_alive():
        worker.join(0.3)
        outage.on = False
    assert outage.refused
    assert store.jobs.job(job_id).counts.succeeded == 60
    assert violations(store) == []


def test_what_the_device_holds_is_kept(store: Store, desk: Desk) -> None:
    mill.load(store, 20)
    desk.engine.capacity.too_much(8)
    desk.runner.run()
    assert store.health.known_capacity(mill.ECHO_SPEC, "host/cpu") == 4
