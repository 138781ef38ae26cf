"""Random histories of a mill: real store, real bookkeeping of a worker, real reconciler; everything else is a fault.

Hypothesis chooses what happens next: submits in pieces, wake-ups lost, doubled or late, turns that a kill cuts short
before, inside and after their commit, a store that is away, prompts that crash whoever runs them, frozen workers,
parents that die, clocks that jump, cancels, retries. After every step the store is held to I1-I10, at the end to
L1-L3 (`Invariants` says what they are). The store's clock and the reconcilers' own are the test's.
"""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from batchmill.jobs.errors import LoadingLost, StoreUnavailable
from batchmill.jobs.models.adapters import Adapter
from batchmill.jobs.requests.causes import Chances
from batchmill.jobs.requests.generation import GenerationRequest
from batchmill.jobs.requests.request import ErrorCode
from batchmill.jobs.requests.states import WorkerState
from batchmill.jobs.store.jobs import create, retry
from batchmill.worker.process.maintenance import leftovers
from batchmill.worker.process.maintenance import reconciler as reconciler_module
from tests.support.store import mill
from tests.support.store.desk import Bed, Desk, Killed
from tests.support.store.invariants import Invariants
from tests.support.store.world import failing

_WORKERS = 3
_MOST_JOBS = 3

_MISFORTUNES = (
    "drains",
    "drains by its row",
    "freezes",
    "freezes for long",
    "freezes for long",
    "is killed",
    "loses its parent",
    "is sick",
)
_SUBMITTED = {
    "pieces": st.lists(st.sampled_from(range(2, 9)), min_size=1, max_size=3),
    "batch_size": st.sampled_from((1, 5, 20, 20)),
    "poison": st.sets(st.sampled_from(range(24)), max_size=2),
}
_WORKED = {
    "count": st.sampled_from(range(1, 7)),
    "thawed": st.booleans(),
    "settled": st.sampled_from(("first", "late", "never")),
}
_ADAPTERS = (Adapter("a", "/adapters/a"), Adapter("b", "org/b", "v1"))
#: Not `integers`, which draws on the constants of whatever modules are loaded, and so differs from run to run.
_DESK = st.sampled_from(range(_WORKERS))


class Mill(Invariants, RuleBasedStateMachine):
    """The rules of a mill's history, and its invariants."""

    def __init__(self, bed: Bed) -> None:
        RuleBasedStateMachine.__init__(self)
        Invariants.__init__(self, bed)

    @initialize(
        rows=st.sampled_from((2, 2, 6, 20)),
        spool_bytes=st.sampled_from((0, 1_000_000)),
        gentle=st.sampled_from((False, False, True)),
    )
    def begin(self, rows: int, spool_bytes: int, gentle: bool) -> None:
        """In a `gentle` history only poison crashes workers."""
        self.rows = rows
        self.gentle = gentle
        self.bed.spool_bytes = spool_bytes
        self.desks = [self.new_desk() for _ in range(_WORKERS)]

    # --- submits ----------------------------------------------------------------------------------------------

    @initialize(**_SUBMITTED)
    def submit_first(self, pieces: list[int], batch_size: int, poison: set[int]) -> None:
        self.submit(pieces, batch_size, poison)

    @precondition(lambda self: len(self.totals) < _MOST_JOBS)
    @rule(**_SUBMITTED)
    def submit_another(self, pieces: list[int], batch_size: int, poison: set[int]) -> None:
        self.submit(pieces, batch_size, poison)

    @precondition(lambda self: len(self.totals) + len(self.loading) < _MOST_JOBS or self.loading)
    @rule(data=st.data(), pieces=st.lists(st.sampled_from(range(1, 9)), min_size=1, max_size=2))
    def submit_in_two_steps(self, data: st.DataObject, pieces: list[int]) -> None:
        """A submit that begins here is opened another time, or never."""
        if not self.loading:
            self.load(pieces, 3)
            return
        job_id = data.draw(st.sampled_from(sorted(self.loading)))
        try:
            self.open(job_id)
        except LoadingLost:
            del self.loading[job_id]

    # --- wake-ups ---------------------------------------------------------------------------------------------

    @rule(desk=_DESK, kind=st.sampled_from(("delivered", "lost", "all lost", "doubled", "late")))
    def wakeup(self, desk: int, kind: str) -> None:
        if kind == "all lost":
            self.queues.waiting.clear()
        elif kind in ("delivered", "lost") and self.queues.waiting:
            self.queues.waiting.popleft()
        child = self.desks[desk].child
        if "lost" not in kind and child is not None and not child.frozen:
            child.open = True

    # --- a worker's work --------------------------------------------------------------------------------------

    @precondition(lambda self: self.awake())
    @rule(
        data=st.data(),
        count=st.sampled_from(range(1, 21)),
        error=st.sampled_from((None, None, ErrorCode.ENGINE_ERROR, ErrorCode.EMPTY_PROMPT)),
    )
    def work(self, data: st.DataObject, count: int, error: ErrorCode | None) -> None:
        """A turn and a step: what a child does all day."""
        desk = data.draw(st.sampled_from(self.awake()))
        self.take_turn(desk)
        self.step(desk, count, error)

    @rule(**_WORKED)
    def everybody_works(self, count: int, thawed: bool, settled: str) -> None:
        self.all_work(count, thawed, settled)

    @rule(**_WORKED)
    def everybody_works_on(self, count: int, thawed: bool, settled: str) -> None:
        """A second rule for the same, so that more is done than goes wrong."""
        self.all_work(count, thawed, settled)

    @precondition(lambda self: any(each.child.engine or each.child.holdings.recorded for each in self.awake()))
    @rule(data=st.data(), count=st.sampled_from(range(1, 21)), dies=st.booleans())
    def engine_steps(self, data: st.DataObject, count: int, dies: bool) -> None:
        desk = data.draw(st.sampled_from(self.awake()))
        self.step(desk, count, None, dies=dies)

    @precondition(lambda self: self.awake() and not self.gentle)
    @rule(
        data=st.data(),
        fate=st.sampled_from(("killed before", "killed inside", "killed after", "rolled back", "answer lost")),
        point=st.sampled_from(("turn.saved", "turn.claimed")),
    )
    def turn_goes_wrong(self, data: st.DataObject, fate: str, point: str) -> None:
        desk = data.draw(st.sampled_from(self.awake()))
        child = desk.child
        assert child is not None
        wanted, said = self.said(child)
        if fate == "rolled back":
            with failing(point, StoreUnavailable("away")), pytest.raises(StoreUnavailable):
                self.say(child, said, wanted)
            self.outlive(child, said)
        elif fate == "answer lost":
            self.say(child, said, wanted)
            self.outlive(child, said)
        else:
            if fate == "killed inside":
                with failing(point, Killed()), pytest.raises(Killed):
                    self.say(child, said, wanted)
            elif fate == "killed after":
                self.say(child, said, wanted)
            self.kill(desk)

    # --- deaths and their consequences ------------------------------------------------------------------------

    @precondition(lambda self: any(each.unsettled or each.child is None for each in self.desks))
    @rule(data=st.data(), settles=st.booleans())
    def after_a_death(self, data: st.DataObject, settles: bool) -> None:
        """The next child begins before or after its parent has settled what the last one left."""
        desk = data.draw(st.sampled_from([each for each in self.desks if each.unsettled or each.child is None]))
        if settles or desk.child is not None:
            desk.settle()
        if desk.child is None:
            desk.spawn()

    @precondition(lambda self: self.busy())
    @rule(data=st.data(), what=st.sampled_from(_MISFORTUNES))
    def misfortune(self, data: st.DataObject, what: str) -> None:
        """A child that loses its parent dies, and nobody settles; another worker replaces it, and a sick one."""
        if self.gentle and not what.startswith("drains"):
            return
        place = data.draw(st.sampled_from(self.busy()))
        desk = self.desks[place]
        assert desk.child is not None
        if what == "drains":
            desk.child.draining = desk.child.open = True
        elif what == "drains by its row":
            self.store.registration.enter(desk.worker_id, WorkerState.DRAINING)
        elif what.startswith("freezes"):
            desk.child.frozen = True
            if what.endswith("for long"):
                self.time_goes_on(61.0, set(range(_WORKERS)), renewed=True)
                self.time_goes_on(31.0, set(range(_WORKERS)), renewed=True)
                self.all_work(1, True, "first")
        else:
            self.kill(desk)
            self.follow(place, what)

    # --- time, and who looks after things ---------------------------------------------------------------------

    @rule(
        seconds=st.sampled_from((0.5, 31.0, 61.0)),
        step=st.sampled_from((0.0, 0.0, 0.0, -5.0, 300.0, -3_600.0)),
        reconcilers=st.sets(_DESK),
        renewed=st.booleans(),
    )
    def time_passes(self, seconds: float, step: float, reconcilers: set[int], renewed: bool) -> None:
        """Passes time; `step` sets the store's clock. A gentle history has neither a step nor silence for a lease."""
        if not self.gentle:
            self.bed.clock.seconds += step
            self.set_back = self.set_back or step < 0
        self.time_goes_on(seconds, reconcilers, renewed=renewed or self.gentle)

    # --- what users do ----------------------------------------------------------------------------------------

    @precondition(lambda self: self.totals)
    @rule(
        data=st.data(),
        what=st.sampled_from(("retry", "retry", "retry of all", "retry cut short", "cancel")),
        pages=st.sampled_from(range(2)),
    )
    def users(self, data: st.DataObject, what: str, pages: int) -> None:
        job_id = data.draw(st.sampled_from(sorted(self.totals)))
        if what == "cancel":
            self.store.closing.cancel(job_id)
        else:
            chances = Chances(keeps_model=True, everything=what == "retry of all")
            self.retry(job_id, chances, pages if what == "retry cut short" else None)

    # --- what must hold ---------------------------------------------------------------------------------------

    @invariant()
    def holds(self) -> None:
        self.check()

    def teardown(self) -> None:
        if self.desks and sys.exc_info()[0] is None:
            self.faults_stop()


class MillWithAdapters(Mill):
    """The same, with requests that only some of the workers can answer."""

    def new_desk(self) -> Desk:
        number = next(self.numbers)
        return Desk(self.store, self.bed, self.queues, self.rows, number, _ADAPTERS[: number % (len(_ADAPTERS) + 1)])

    def last_desk(self) -> Desk:
        return Desk(self.store, self.bed, self.queues, self.rows, next(self.numbers), _ADAPTERS)

    def prompts(self, count: int, first: int) -> list[GenerationRequest]:
        names = itertools.cycle((None, *(each.name for each in _ADAPTERS)))
        return mill.named(*itertools.islice(names, first, first + count), first=first)


# --- the tests --------------------------------------------------------------------------------------------------


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of a history is left to chance, and a page of a retry is small."""
    numbers = itertools.count(1)
    monkeypatch.setattr(create, "new_job_id", lambda: f"job{next(numbers):05}")
    monkeypatch.setattr(retry, "PAGE_REQUESTS", 5)
    monkeypatch.setattr(os, "fsync", lambda _descriptor: None)
    for module in (reconciler_module, leftovers):
        monkeypatch.setattr(module, "log", Mock())


def run_histories(
    url: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    histories: int,
    steps: int,
    kind: type[Mill] = Mill,
) -> None:
    bed = Bed(url, folder)
    monkeypatch.setattr(reconciler_module, "monotonic", lambda: bed.own_clock.seconds)
    profile = settings(
        max_examples=histories,
        stateful_step_count=steps,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    try:
        run_state_machine_as_test(lambda: kind(bed), settings=profile)
    finally:
        bed.store.close()


@pytest.mark.usefixtures("quiet")
class TestHistories:
    @pytest.mark.timeout(1800)
    def test_a_hundred_and_fifty(self, sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        run_histories(sqlite_url, tmp_path, monkeypatch, histories=150, steps=40)

    @pytest.mark.timeout(1800)
    def test_thirty_with_adapters(self, sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        run_histories(sqlite_url, tmp_path, monkeypatch, histories=30, steps=40, kind=MillWithAdapters)

    @pytest.mark.slow
    @pytest.mark.timeout(1800)
    def test_two_hundred_with_adapters_on_postgresql(
        self, postgresql_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run_histories(postgresql_url, tmp_path, monkeypatch, histories=200, steps=60, kind=MillWithAdapters)

    @pytest.mark.slow
    @pytest.mark.timeout(1800)
    def test_five_hundred(self, sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        run_histories(sqlite_url, tmp_path, monkeypatch, histories=500, steps=60)

    @pytest.mark.slow
    @pytest.mark.timeout(1800)
    def test_two_hundred_on_postgresql(
        self, postgresql_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run_histories(postgresql_url, tmp_path, monkeypatch, histories=200, steps=50)
