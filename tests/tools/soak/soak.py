"""One soak: a mill at work, faults at random, and everything checked at the end.

The main thread starts and restarts what there is, breaks it, and measures; the users are a thread of their own, and so
is the oracle's look in passing.
"""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from random import Random
from time import monotonic

from tests.tools.soak.faults import kinds
from tests.tools.soak.load import Load, Stream
from tests.tools.soak.measures import Measures
from tests.tools.soak.memory import Memory
from tests.tools.soak.posts import Post, can_contain, end_all
from tests.tools.soak.report import Report, check_end, oracle
from tests.tools.soak.scene import Steps
from tests.tools.soak.world import World

_TICK_SECONDS = 0.2
_BETWEEN_FAULTS_SECONDS = (5.0, 20.0)
_FIRST_FAULT_SECONDS = 15.0
_ORACLE_SECONDS = 600.0
_FINISH_SECONDS = 300.0
#: An echo of another quantization: the queue of the worker that nothing is done to.
_TWIN = ("-q", "nf4")


@dataclass(slots=True)
class _Going:
    """A fault on its way: it goes on at a time; `alone`: what it breaks alone."""

    name: str
    steps: Steps
    at: float
    alone: str


class Soak:
    """`run` says whether all went well."""

    def __init__(self, database: str, *, seed: int, minutes: float, workers: int, folder: Path) -> None:
        self._seed, self._minutes = seed, minutes
        self._world = World(database, folder)
        self._posts = [Post(self._world, f"w{number}") for number in range(1, workers)]
        self._posts.append(Post(self._world, "far", host="another-host"))
        if can_contain():
            self._posts.append(Post(self._world, "contained", host="container", contained=True))
        else:
            self._world.note("no container restarts: this user may make no pid namespace")
        self._steady = Post(self._world, "steady", words=_TWIN)
        self._random = Random(seed)
        self._measures = Measures(self._world)
        self._kinds = kinds(self._world, self._measures, self._posts, self._random)
        streams = [
            Stream("everybody", 4, (200, 3_000)),
            Stream("steady", 1, (200, 2_000), _TWIN, "tests.tools.soak.producer", plain=True),
        ]
        self._load = Load(self._world, streams, Random(seed + 1))
        self._memory = Memory()
        self._going: list[_Going] = []
        self._next_fault = monotonic() + _FIRST_FAULT_SECONDS
        #: Each kind comes once, in any order, before chance decides.
        self._first = self._random.sample(sorted(self._kinds), len(self._kinds))
        self._counted: Counter[str] = Counter()
        self._oracles = 0
        self._asked_to_end = False

    def run(self) -> bool:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        try:
            self._world.note("soak", database=self._world.database, seed=self._seed, folder=str(self._world.folder))
            self._load.start()
            self._break_things()
            self._finish()
            check_end(self._world, self._all, self._load)
            report = Report(self._world, seed=self._seed, minutes=self._minutes)
            report.print(self._all, self._load, self._measures, self._memory, self._counted, self._oracles)
        finally:
            self._mend()
            self._load.over.set()
            end_all(self._all)
            self._world.end()
        return not self._world.problems

    @property
    def _all(self) -> list[Post]:
        return [*self._posts, self._steady]

    def _on_signal(self, *_: object) -> None:
        if self._asked_to_end:
            raise KeyboardInterrupt
        self._asked_to_end = True

    def _break_things(self) -> None:
        end = monotonic() + 60 * self._minutes
        every = min(_ORACLE_SECONDS, 20 * self._minutes)
        look_at = monotonic() + every
        while monotonic() < end and not self._asked_to_end:
            self._tick()
            if monotonic() >= self._next_fault:
                self._begin_fault()
            if monotonic() >= look_at:
                look_at += every
                threading.Thread(target=self._look, name="oracle", daemon=True).start()

    def _tick(self) -> None:
        for post in self._all:
            post.tick()
        for going in [each for each in self._going if monotonic() >= each.at]:
            self._step(going)
        self._measures.poll()
        self._memory.sample(self._all)
        time.sleep(_TICK_SECONDS)

    def _begin_fault(self) -> None:
        self._next_fault = monotonic() + self._random.uniform(*_BETWEEN_FAULTS_SECONDS)
        taken = {each.alone for each in self._going if each.alone}
        free = {name: kind for name, kind in self._kinds.items() if kind.alone not in taken}
        name = next((name for name in self._first if name in free), "")
        if name:
            self._first.remove(name)
        else:
            name = self._random.choices(list(free), [kind.weight for kind in free.values()])[0]
        kind = free[name]
        self._counted[name] += 1
        going = _Going(name, kind.begin(), monotonic(), kind.alone)
        self._going.append(going)
        self._step(going)

    def _step(self, going: _Going) -> None:
        try:
            going.at = monotonic() + next(going.steps)
        except StopIteration:
            self._going.remove(going)

    def _mend(self) -> None:
        """Ends every fault that is under way."""
        for going in self._going:
            going.steps.close()
        self._going.clear()
        self._world.proxy.heal()

    def _look(self) -> None:
        """The oracle's look while everything is at work."""
        began = monotonic()
        try:
            found = oracle(self._world, closed=False)
        except Exception as error:  # the store may be away now
            self._world.note("oracle could not look", error=str(error)[:200])
            return
        self._oracles += 1
        self._world.note("oracle", violations=len(found), took=round(monotonic() - began, 1))
        for sentence in found:
            self._world.problem(f"oracle in passing: {sentence}")

    def _finish(self) -> None:
        """No more faults: everything that is open has to end by itself."""
        self._world.note("no more faults", open_jobs=len(self._load.open_jobs), **self._load.totals)
        self._mend()
        self._load.close()
        deadline = monotonic() + _FINISH_SECONDS
        while monotonic() < deadline and (self._load.is_alive() or self._measures.waiting):
            self._tick()
        self._world.note(
            "finished", open_jobs=len(self._load.open_jobs), after=round(_FINISH_SECONDS - deadline + monotonic(), 1)
        )
        self._load.over.set()
        self._load.join(60)
        end_all(self._all)
