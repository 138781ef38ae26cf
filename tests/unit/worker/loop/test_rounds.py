"""One thread drives the engine, whoever finds the work: nothing runs twice at a time, and every wake-up is answered."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from batchmill.worker.loop.rounds import Rounds
from tests.integration.conftest import until


class Engine:
    """Notes how many rounds there were, and whether two ever ran at once."""

    def __init__(self) -> None:
        self.rounds = 0
        self.twice = False
        self.has_work = False
        self.gate = threading.Event()
        self.gate.set()
        self.at_work = threading.Lock()

    def work(self) -> None:
        if not self.at_work.acquire(blocking=False):
            self.twice = True
            return
        self.rounds += 1
        time.sleep(0.001)
        self.gate.wait()
        self.at_work.release()

    def finds_work(self) -> bool:
        return self.has_work


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine()
    yield engine
    engine.gate.set()
    assert not engine.twice


def begun(engine: Engine, *, every_seconds: float) -> Rounds:
    rounds = Rounds(engine.work, engine.finds_work, every_seconds=every_seconds)
    rounds.start()
    return rounds


def test_who_wakes_it_gets_a_round_that_begins_afterwards(engine: Engine) -> None:
    rounds = begun(engine, every_seconds=3600)
    engine.gate.clear()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(rounds.wake)
        until(lambda: engine.rounds == 1, "the first round runs")
        second = pool.submit(rounds.wake)
        until(lambda: rounds._asked == 2, "the second wake-up has come")
        engine.gate.set()
        first.result(60)
        second.result(60)
    assert engine.rounds == 2
    rounds.finish()


def test_an_idle_one_works_only_where_it_finds_work(engine: Engine) -> None:
    rounds = begun(engine, every_seconds=0.01)
    time.sleep(0.1)
    assert engine.rounds == 0
    engine.has_work = True
    until(lambda: engine.rounds > 2, "it works by itself")
    rounds.finish()


def test_many_wake_ups_beside_work_that_it_finds_itself_never_run_two_rounds_at_once(engine: Engine) -> None:
    engine.has_work = True
    rounds = begun(engine, every_seconds=0.001)
    with ThreadPoolExecutor(8) as pool:
        for each in [pool.submit(rounds.wake) for _ in range(200)]:
            each.result(60)
    rounds.finish()


def test_finish_waits_for_the_round_at_work_and_lets_none_begin(engine: Engine) -> None:
    engine.has_work = True
    rounds = begun(engine, every_seconds=0.01)
    engine.gate.clear()
    until(lambda: engine.at_work.locked(), "a round runs")
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(rounds.finish)
        until(lambda: rounds._over, "it is asked to end")
        assert not ended.done()
        engine.gate.set()
        ended.result(60)
    done = engine.rounds
    time.sleep(0.1)
    assert engine.rounds == done
