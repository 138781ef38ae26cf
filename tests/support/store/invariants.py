"""The invariants of a history: I1 to I10 after every step, L1 to L3 once the faults have stopped."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

from batchmill.jobs.requests.request import ErrorCode
from batchmill.jobs.requests.states import CLOSED_JOB_STATES, BatchState, RunOutcome
from batchmill.jobs.store.leases.blame import SUSPECT_GROUPS
from tests.support.store.desk import BEAT_SECONDS, Desk, Seen
from tests.support.store.oracle import violations
from tests.support.store.world import World

#: An innocent is alone after so many crashes that poison caused, and then answers.
_INNOCENT_CRASHES = len(SUSPECT_GROUPS) - 1
#: The oracle's sentences that compare two times.
_OF_TIMES = re.compile(r"^\(and|began after it ended|began before the run ahead|was written while its run")


class Invariants(World):
    """A world, and the checks of its rows."""

    def check(self) -> None:
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
            self.store.registration.heartbeat(last.worker_id, beat=BEAT_SECONDS)
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
                self.check()

    def is_open(self) -> bool:
        seen = self.see()
        return any(each.state not in CLOSED_JOB_STATES for each in seen.jobs.values())

    def everything_ended_rightly(self, seen: Seen) -> None:
        assert seen.jobs.keys() == self.totals.keys(), "a dead submit was not discarded"
        for key in self.poison & seen.requests.keys():
            ended = seen.outputs[key].error_code
            assert ended in (ErrorCode.POISON.value, ErrorCode.CANCELLED.value), f"L2: {key} ended as {ended}"
