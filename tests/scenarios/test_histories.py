"""Random histories of a mill: real store, real bookkeeping of a worker, real reconciler; everything else is a fault.

Hypothesis chooses what happens next: submits in pieces, wake-ups lost, doubled or late, turns that a kill cuts short
before, inside and after their commit, a store that is away, prompts that crash whoever runs them, frozen workers,
parents that die, clocks that jump, cancels, retries. After every step the store is held to I1-I10, at the end to
L1-L3 (`Mill.look` and `Mill.teardown` say what they are). The store's clock and the reconcilers' own are the test's.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
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
from sqlalchemy import select

from batchmill.jobs.errors import JobStateError, LoadingLost, StoreUnavailable
from batchmill.jobs.models.adapters import Adapter
from batchmill.jobs.models.device_memory import Memory
from batchmill.jobs.requests.causes import Chances
from batchmill.jobs.requests.generation import GenerationRequest
from batchmill.jobs.requests.request import ErrorCode, Output, RequestKey
from batchmill.jobs.requests.states import CLOSED_JOB_STATES, BatchState, RequestState, RunOutcome, WorkerState
from batchmill.jobs.store.jobs import create, retry
from batchmill.jobs.store.leases import sync
from batchmill.jobs.store.leases.blame import SUSPECT_GROUPS
from batchmill.jobs.store.tables import batches, jobs, outputs, requests, runs
from batchmill.worker.loop.holdings import SyncRequest
from batchmill.worker.process.maintenance import leftovers
from batchmill.worker.process.maintenance import reconciler as reconciler_module
from tests.support.store import mill
from tests.support.store.desk import BEAT_SECONDS, Bed, Child, Desk, Key, Killed, Queues, Seen
from tests.support.store.oracle import violations

_WORKERS = 3
_MOST_JOBS = 3
#: An innocent is alone after so many crashes that poison caused, and then answers.
_INNOCENT_CRASHES = len(SUSPECT_GROUPS) - 1

_OUTPUT_COLUMNS = ("state", "run_id", "payload", "error_code", "finished_at")
_RUN_COLUMNS = ("id", "job_id", "batch_id", "fence", "worker_id", "worker_generation", "outcome", "in_flight")
#: The oracle's sentences that compare two times.
_OF_TIMES = re.compile(r"^\(and|began after it ended|began before the run ahead|was written while its run")

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


# --- the machine ------------------------------------------------------------------------------------------------


class Mill(RuleBasedStateMachine):
    """The rules of a mill's history, and its invariants."""

    def __init__(self, bed: Bed) -> None:
        super().__init__()
        bed.empty()
        self.bed = bed
        self.store = bed.store
        self.queues = Queues()
        self.desks: list[Desk] = []
        self.numbers = itertools.count(1)
        self.loading: dict[str, int] = {}  # job id -> how many requests were added
        self.totals: dict[str, int] = {}
        self.poison: set[Key] = set()
        self.accepted: dict[Key, tuple[object, ...]] = {}
        self.fences: dict[int, int] = {}
        self.ended_runs: set[int] = set()
        self.died_of_poison: set[tuple[int, int]] = set()  # (worker, generation)
        self.unfair: Counter[Key] = Counter()  # how often a process died of something else with it in flight
        self.set_back = False
        self.poison_crashes = 0
        self.crashes_allowed = 0
        self.generated = 0
        self.saved = 0
        self.counted: set[Key] = set()
        self.wasted = 0

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

    def new_desk(self) -> Desk:
        return Desk(self.store, self.bed, self.queues, self.rows, next(self.numbers))

    def last_desk(self) -> Desk:
        """A desk that can work everything off."""
        return self.new_desk()

    def prompts(self, count: int, first: int) -> list[GenerationRequest]:
        return mill.prompts(count, first=first)

    # --- submits ----------------------------------------------------------------------------------------------

    @initialize(**_SUBMITTED)
    def submit_first(self, pieces: list[int], batch_size: int, poison: set[int]) -> None:
        self.submit(pieces, batch_size, poison)

    @precondition(lambda self: len(self.totals) < _MOST_JOBS)
    @rule(**_SUBMITTED)
    def submit_another(self, pieces: list[int], batch_size: int, poison: set[int]) -> None:
        self.submit(pieces, batch_size, poison)

    def submit(self, pieces: list[int], batch_size: int, poison: set[int]) -> None:
        job_id = self.load(pieces, batch_size)
        self.poison |= {(job_id, index) for index in poison if index < sum(pieces)}
        self.crashes_allowed += (len(SUSPECT_GROUPS) + 1) * len(self.poison_of(job_id))
        self.open(job_id)

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

    def load(self, pieces: Sequence[int], batch_size: int) -> str:
        self.bed.clock.seconds += 0.01
        job_id = mill.begin(self.store, batch_size=batch_size)
        first = 0
        for count in pieces:
            self.store.creation.add(
                job_id,
                prompts=self.prompts(count, first),
                batch_size=batch_size,
                lease_seconds=mill.LEASE_SECONDS,
            )
            first += count
        self.loading[job_id] = first
        return job_id

    def open(self, job_id: str) -> None:
        self.store.creation.open(
            job_id, spec=mill.ECHO_SPEC, file_sha256="0", fingerprint="f", lease_seconds=mill.LEASE_SECONDS
        )
        self.totals[job_id] = self.loading.pop(job_id)

    def poison_of(self, job_id: str) -> set[Key]:
        return {key for key in self.poison if key[0] == job_id}

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

    def awake(self) -> list[Desk]:
        """Workers whose child runs and has a task."""
        return [each for each in self.desks if each.child is not None and each.child.open and not each.child.frozen]

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

    def all_work(self, count: int, thawed: bool, settled: str) -> None:
        """Parents may be slow to settle what a dead child left."""
        for desk in self.desks:
            if settled == "first":
                desk.settle()
            if settled != "never" and desk.child is None:
                desk.spawn()
            if desk.child is not None and not desk.child.frozen:
                desk.child.open = True  # a wake-up that came late, if at all
        for desk in self.awake():
            self.take_turn(desk)
            self.step(desk, count, None)
        if thawed:
            self.thaw(count)
        if settled == "late":
            for desk in self.desks:
                desk.settle()

    def thaw(self, count: int) -> None:
        """A child that thaws goes on as if nothing had happened: it answers, then it says so."""
        for desk in self.desks:
            if desk.child is not None and desk.child.frozen:
                desk.child.frozen = False
                self.step(desk, count, None)
            if desk.child is not None and desk.child.open:
                self.take_turn(desk)

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

    def take_turn(self, desk: Desk) -> None:
        """A turn that goes well, and that is fenced exactly where a lease was taken."""
        child = desk.child
        assert child is not None
        wanted, said = self.said(child)
        before = self.see()
        turned = self.say(child, said, wanted)
        assert turned.lost == {each.lease.batch_id for each in said.reports if not before.holds(each.lease)}
        for each in said.reports:
            if each.lease.batch_id in turned.lost:
                self.wasted += len(each.outputs)
        self.check_writers(before, child)
        child.spool.clear()
        child.away = child.full = False
        child.forget(child.holdings.absorb(said, turned))
        child.draining = child.draining or turned.drain
        if not child.holdings and not turned.claimed and (child.draining or wanted):
            child.open = False
            if child.draining:
                desk.child = None

    def said(self, child: Child) -> tuple[int, SyncRequest]:
        wanted, room = child.room()
        return wanted, child.holdings.next_request(room=room, memory=Memory(), release=child.draining)

    def say(self, child: Child, said: SyncRequest, wanted: int) -> Any:
        room = child.room()[1] - sum(said.entering.values())
        return self.store.leases.sync(
            child.session, said.reports, wanted_requests=wanted, in_flight_room=room, resumed=child.away
        )

    def outlive(self, child: Child, said: SyncRequest) -> None:
        """The store did not answer: the spool takes what was said, and what it takes may enter the engine."""
        spooled = child.spool.append(said.reports)
        child.away, child.full = True, not spooled
        if spooled:
            child.holdings.enter(said)

    def check_writers(self, before: Seen, child: Child) -> None:
        """I7: what a turn wrote is of runs whose fence was current, and held by this child, when it began."""
        after = self.see()
        for key in after.outputs.keys() - before.outputs.keys():
            run_id = after.outputs[key].run_id
            if run_id is not None:
                run = after.runs[run_id]
                was = before.batches[run.batch_id]
                assert (was.state, was.fence) == (BatchState.LEASED.value, run.fence), key
                assert (was.worker_id, was.worker_generation) == (child.session.worker_id, child.session.generation), (
                    key
                )

    def step(self, desk: Desk, count: int, error: ErrorCode | None, *, dies: bool = True) -> None:
        """The engine answers up to `count` of its rows, or dies if one of them is poison."""
        child = desk.child
        if child is None or child.full:
            return
        child.top_up()
        rows = [key for key, _ in child.engine[: child.rows]]
        if dies and any((key.job_id, key.index) in self.poison for key in rows):
            self.die_of_poison(desk)
            return
        answers = [key for key in rows if (key.job_id, key.index) not in self.poison][:count]
        child.forget(answers)
        self.generated += len(answers)
        child.holdings.answer([self.answer(key, error) for key in answers])

    def answer(self, key: RequestKey, error: ErrorCode | None) -> Output:
        """No two answers are the same, so that a changed output is seen."""
        return mill.output(key.job_id, key.index, error=error, text=f"answer {self.generated} {key.index}")

    def die_of_poison(self, desk: Desk) -> None:
        child = desk.child
        assert child is not None
        self.died_of_poison.add((desk.worker_id, child.session.generation))
        self.poison_crashes += 1
        seen, leases = self.see(), child.leases()
        in_rows = {(key.job_id, key.index) for key, _ in child.engine[: child.rows]}
        if not any(
            seen.holds(leases[seen.requests[key]]) for key in in_rows & self.poison if seen.requests[key] in leases
        ):
            self.crashes_allowed += 1  # its lease was taken before, so nobody blames it for this crash
        self.kill(desk)

    # --- deaths and their consequences ------------------------------------------------------------------------

    def kill(self, desk: Desk) -> None:
        child = desk.child
        assert child is not None
        self.wasted += child.holdings.unsaved
        desk.unsettled = child.session.generation
        desk.child = None

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
            self.store.workers.enter(desk.worker_id, WorkerState.DRAINING)
        elif what.startswith("freezes"):
            desk.child.frozen = True
            if what.endswith("for long"):
                self.time_goes_on(61.0, set(range(_WORKERS)), renewed=True)
                self.time_goes_on(31.0, set(range(_WORKERS)), renewed=True)
                self.all_work(1, True, "first")
        else:
            self.kill(desk)
            self.follow(place, what)

    def busy(self) -> list[int]:
        return [place for place, each in enumerate(self.desks) if each.child is not None and each.child.holdings]

    def follow(self, place: int, what: str) -> None:
        """Replaces a worker whose death was more than its child's."""
        if what == "is sick":
            self.be_sick(self.desks[place])
        if what != "is killed":
            self.desks[place] = self.new_desk()

    def be_sick(self, desk: Desk) -> None:
        """Requests that the crashes of a sick worker blamed are acquitted."""
        desk.settle()
        seen = self.see()
        mine = {each.id for each in seen.batches.values() if each.crashed_by == desk.worker_id}
        self.crashes_allowed += len([key for key in self.poison if seen.requests.get(key) in mine])
        self.store.health.enter_sick(desk.worker_id, reason="its device is broken")

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

    def time_goes_on(self, seconds: float, reconcilers: set[int], *, renewed: bool) -> None:
        """Parents beat, some reconcile, wake-ups arrive, and who is awake may say so."""
        self.bed.own_clock.seconds += seconds
        self.bed.clock.seconds += seconds
        for desk in self.desks:
            self.store.workers.heartbeat(desk.worker_id, beat=BEAT_SECONDS)
            if renewed and desk.child is not None and not desk.child.frozen:
                self.take_turn_asleep(desk)
        for place in sorted(reconcilers):
            self.desks[place].reconciler.repair()
            self.desks[place].reconciler.send_wakeups()
        for desk in self.desks:
            if self.queues.waiting and desk.child is not None and not desk.child.frozen and not desk.child.open:
                self.queues.waiting.popleft()
                desk.child.open = True

    def take_turn_asleep(self, desk: Desk) -> None:
        """A turn that only renews, also of a child without a task."""
        assert desk.child is not None
        if desk.child.holdings:
            desk.child.open = True
            self.take_turn(desk)

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

    def retry(self, job_id: str, chances: Chances, pages: int | None) -> None:
        """Retries a job; with `pages` it is cut short after so many pages."""
        before = self.see()
        was_closed = before.jobs[job_id].state in CLOSED_JOB_STATES
        try:
            if pages is None:
                self.store.retries.retry(job_id, chances)
            else:
                most = self.store.retries._begin_retry(job_id)
                chosen = self.store.retries._chosen(job_id, chances, defaultdict(retry.LeftAlone))
                for _ in range(pages):
                    self.store.retries._retry_page(job_id, list(itertools.islice(chosen, most)))
        except JobStateError:
            assert not was_closed
            return
        after = self.see()
        for key in before.outputs.keys() - after.outputs.keys():
            assert before.outputs[key].state != RequestState.SUCCEEDED.value, key
            assert key[0] == job_id, key
            del self.accepted[key]
            self.counted.discard(key)
            self.crashes_allowed += (len(SUSPECT_GROUPS) + 1) * (key in self.poison)
        if pages is None and was_closed:
            failed = {key: row for key, row in after.outputs.items() if key[0] == job_id and row.state != "succeeded"}
            left = [key for key, row in failed.items() if chances.are_there(row.error_code, prompt_tokens=0)]
            assert not left, f"a retry left {left}"
            assert failed.items() <= before.outputs.items(), "what is left alone is as it was"

    # --- what must hold ---------------------------------------------------------------------------------------

    @invariant()
    def holds(self) -> None:
        if not self.desks:
            return
        self.ask_the_oracle(closed=False)
        self.look(self.see())

    def ask_the_oracle(self, *, closed: bool) -> None:
        """The order of times says nothing once the clock was set back."""
        found = violations(self.store, closed=closed)
        assert [each for each in found if not (self.set_back and _OF_TIMES.search(each))] == []
        if closed:
            assert list(self.store.checking.findings(self.store.checking.job_ids())) == []

    def look(self, seen: Seen) -> None:
        self.outputs_stay(seen)
        self.fences_rise(seen)
        self.leases_are_known(seen)
        self.suspects_run_apart(seen)
        self.blame_is_fair(seen)
        assert self.poison_crashes <= self.crashes_allowed
        unsaved = sum(each.child.holdings.unsaved for each in self.desks if each.child is not None)
        assert self.generated <= self.saved + self.wasted + unsaved, "I10: work was done twice without a loss"

    def outputs_stay(self, seen: Seen) -> None:
        """I2: an accepted output never changes or disappears; I4: no request does; I6: a closed job has no pending."""
        for key, row in seen.outputs.items():
            was = self.accepted.setdefault(key, tuple(row))
            assert was == tuple(row), f"I2: the output of {key} changed"
        assert self.accepted.keys() == seen.outputs.keys(), "I2: outputs disappeared"
        of_workers = {
            key
            for key, row in seen.outputs.items()
            if row.run_id is not None and row.error_code != ErrorCode.POISON.value
        }
        self.saved += len(of_workers - self.counted)
        self.counted |= of_workers
        counts = Counter(job_id for job_id, _ in seen.requests)
        answered = Counter(job_id for job_id, _ in seen.outputs)
        for job_id, total in self.totals.items():
            assert counts[job_id] == total, "I4"
            if seen.jobs[job_id].state in CLOSED_JOB_STATES:
                assert answered[job_id] == total, "I6"

    def fences_rise(self, seen: Seen) -> None:
        """I7: a batch's fence never falls, and every claim has raised it."""
        for batch in seen.batches.values():
            assert batch.fence >= self.fences.get(batch.id, 0), "I7"
            self.fences[batch.id] = batch.fence
        open_runs = [each for each in seen.runs.values() if each.outcome is None]
        for run in open_runs:
            batch = seen.batches[run.batch_id]
            assert (batch.state, batch.fence) == (BatchState.LEASED.value, run.fence), "I7: a run without a lease"

    def leases_are_known(self, seen: Seen) -> None:
        """I8: what the store calls held by a living child that child knows, with the same fence."""
        for desk in self.desks:
            if desk.child is None or desk.child.away:
                continue
            known = desk.child.leases()
            assert known.keys() >= {each.id for each in self.held_by(seen, desk)}, "I8: a child forgot what it holds"
            for batch in self.held_by(seen, desk):
                assert known[batch.id].fence == batch.fence, "I8"

    def held_by(self, seen: Seen, desk: Desk) -> list[Any]:
        who = (desk.worker_id, desk.generation)
        return [each for each in seen.batches.values() if (each.worker_id, each.worker_generation) == who]

    def suspects_run_apart(self, seen: Seen) -> None:
        """A worker that holds a suspect holds nothing else, and suspects are in groups that get smaller."""
        for desk in self.desks:
            held = self.held_by(seen, desk)
            assert len(held) <= 1 or not any(each.crashes for each in held), "a suspect does not run apart"
        sizes = Counter(seen.requests.values())
        for batch in seen.batches.values():
            if batch.crashes:
                assert sizes[batch.id] <= SUSPECT_GROUPS[batch.crashes - 1], "a group of suspects is too large"

    def blame_is_fair(self, seen: Seen) -> None:
        """L3: more crashes than poison alone can cause come from other deaths."""
        for run in seen.runs.values():
            if run.id not in self.ended_runs and run.outcome in (RunOutcome.CRASHED, RunOutcome.EXPIRED):
                self.ended_runs.add(run.id)
                alive = {(each.worker_id, each.generation) for each in self.desks if each.child is not None}
                is_dead = (run.worker_id, run.worker_generation) not in alive
                assert is_dead or run.outcome == RunOutcome.EXPIRED, "what a living child held was taken back"
                of_poison = (run.worker_id, run.worker_generation) in self.died_of_poison
                if run.outcome == RunOutcome.EXPIRED:
                    self.crashes_allowed += of_poison  # who sees silence alone blames nobody
                elif not of_poison:
                    self.unfair.update((run.job_id, index) for index in json.loads(run.in_flight))
        for key in seen.requests.keys() - self.poison:
            if key not in seen.outputs:
                assert seen.batch_of(key).crashes <= _INNOCENT_CRASHES + self.unfair[key], f"L3: {key} is blamed"
        for key, row in seen.outputs.items():
            if row.error_code == ErrorCode.POISON.value and key not in self.poison:
                assert self.unfair[key] >= len(SUSPECT_GROUPS) + 1 - _INNOCENT_CRASHES, f"L3: {key} ended as poison"

    # --- the end ----------------------------------------------------------------------------------------------

    def teardown(self) -> None:
        if self.desks and sys.exc_info()[0] is None:
            self.faults_stop()

    def faults_stop(self) -> None:
        """L1: one worker works everything off in bounded time; L2: every poison request ends as poison."""
        last = self.last_desk()
        for desk in self.desks:
            if desk.child is not None:
                self.kill(desk)
        self.desks = [last]
        self.queues.waiting.clear()
        bound = 20 + 4 * sum(self.totals.values()) + 12 * len(self.poison)
        rounds = 0
        while self.is_open():
            rounds += 1
            assert rounds <= bound, f"L1: something is open after {rounds} rounds"
            self.bed.clock.seconds += 31.0
            self.bed.own_clock.seconds += 31.0
            self.store.workers.heartbeat(last.worker_id, beat=BEAT_SECONDS)
            last.reconciler.repair()
            last.reconciler.send_wakeups()
            if self.queues.waiting and last.child is not None:
                self.queues.waiting.popleft()
                last.child.open = True
            self.work_a_round(last, 1 + rounds % 3)
        self.ask_the_oracle(closed=True)
        self.everything_ended_rightly(self.see())

    def work_a_round(self, desk: Desk, count: int) -> None:
        for _ in range(6):
            if desk.child is None:
                desk.settle()
                desk.spawn()
            elif desk.child.open:
                self.take_turn(desk)
                self.step(desk, count, None)
                self.holds()

    def is_open(self) -> bool:
        seen = self.see()
        return any(each.state not in CLOSED_JOB_STATES for each in seen.jobs.values())

    def everything_ended_rightly(self, seen: Seen) -> None:
        assert seen.jobs.keys() == self.totals.keys(), "a dead submit was not discarded"
        for key in self.poison & seen.requests.keys():
            ended = seen.outputs[key].error_code
            assert ended in (ErrorCode.POISON.value, ErrorCode.CANCELLED.value), f"L2: {key} ended as {ended}"

    def see(self) -> Seen:
        place, job = outputs.c.index.label("place"), outputs.c.job_id
        of_requests = select(requests.c.job_id, requests.c.index.label("place"), requests.c.batch_id)
        of_outputs = select(job, place, *(outputs.c[name] for name in _OUTPUT_COLUMNS))
        with self.store.database.read() as connection:
            return Seen(
                {row.id: row for row in connection.execute(select(jobs.c.id, jobs.c.state))},
                {row.id: row for row in connection.execute(select(batches))},
                {(row.job_id, row.place): row.batch_id for row in connection.execute(of_requests)},
                {(row.job_id, row.place): row for row in connection.execute(of_outputs)},
                {row.id: row for row in connection.execute(select(*(runs.c[name] for name in _RUN_COLUMNS)))},
            )


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


@contextmanager
def failing(point: str, error: BaseException) -> Iterator[None]:
    """The next turn raises this inside its transaction."""

    def fail(name: str) -> None:
        if name == point:
            raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sync, "failpoint", fail)
        yield


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
