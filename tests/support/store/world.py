"""The world of a history: desks of workers over one store, everything that can happen to them, and a look at all rows.

It acts, and checks at once what an act may have done; `invariants` checks what holds after any act.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import select

from batchmill.jobs.errors import JobStateError
from batchmill.jobs.models.device_memory import Memory
from batchmill.jobs.requests.causes import Chances
from batchmill.jobs.requests.generation import GenerationRequest
from batchmill.jobs.requests.request import ErrorCode, Output, RequestKey
from batchmill.jobs.requests.states import CLOSED_JOB_STATES, BatchState, RequestState
from batchmill.jobs.store.jobs import retry
from batchmill.jobs.store.leases import sync
from batchmill.jobs.store.leases.blame import SUSPECT_GROUPS
from batchmill.jobs.store.tables import batches, jobs, outputs, requests, runs
from batchmill.worker.loop.holdings import SyncRequest
from tests.support.store import mill
from tests.support.store.desk import BEAT_SECONDS, Bed, Child, Desk, Key, Queues, Seen

_OUTPUT_COLUMNS = ("state", "run_id", "payload", "error_code", "finished_at")
_RUN_COLUMNS = ("id", "job_id", "batch_id", "fence", "worker_id", "worker_generation", "outcome", "in_flight")


class World:
    """A store, the desks of its workers, and a record of everything that was done."""

    rows: int  #: the rows of each engine
    gentle: bool  #: True where only poison crashes workers

    def __init__(self, bed: Bed) -> None:
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

    def new_desk(self) -> Desk:
        return Desk(self.store, self.bed, self.queues, self.rows, next(self.numbers))

    def last_desk(self) -> Desk:
        """A desk that can work everything off."""
        return self.new_desk()

    def prompts(self, count: int, first: int) -> list[GenerationRequest]:
        return mill.prompts(count, first=first)

    def submit(self, pieces: list[int], batch_size: int, poison: set[int]) -> None:
        job_id = self.load(pieces, batch_size)
        self.poison |= {(job_id, index) for index in poison if index < sum(pieces)}
        self.crashes_allowed += (len(SUSPECT_GROUPS) + 1) * len(self.poison_of(job_id))
        self.open(job_id)

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

    def awake(self) -> list[Desk]:
        """Workers whose child runs and has a task."""
        return [each for each in self.desks if each.child is not None and each.child.open and not each.child.frozen]

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

    def kill(self, desk: Desk) -> None:
        child = desk.child
        assert child is not None
        self.wasted += child.holdings.unsaved
        desk.unsettled = child.session.generation
        desk.child = None

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

    def time_goes_on(self, seconds: float, reconcilers: set[int], *, renewed: bool) -> None:
        """Parents beat, some reconcile, wake-ups arrive, and who is awake may say so."""
        self.bed.own_clock.seconds += seconds
        self.bed.clock.seconds += seconds
        for desk in self.desks:
            self.store.registration.heartbeat(desk.worker_id, beat=BEAT_SECONDS)
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


@contextmanager
def failing(point: str, error: BaseException) -> Iterator[None]:
    """The next turn raises this inside its transaction."""

    def fail(name: str) -> None:
        if name == point:
            raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sync, "failpoint", fail)
        yield
