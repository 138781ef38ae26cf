"""The checks of a soak when everything has ended, and the table that it prints."""

from __future__ import annotations

import os
import re
import socket
import sqlite3
from collections import Counter
from contextlib import closing, suppress
from pathlib import Path

import psutil
from sqlalchemy import text

from batchmill.jobs.requests.states import RunOutcome
from batchmill.jobs.store.store import Store
from tests.support.store.oracle import violations
from tests.tools.bench.table import Row, show
from tests.tools.soak import measures
from tests.tools.soak.load import Load
from tests.tools.soak.measures import Measures
from tests.tools.soak.memory import Memory
from tests.tools.soak.posts import Post
from tests.tools.soak.worker import read_counts
from tests.tools.soak.world import ROWS, STEP_SECONDS, World

END_SECONDS = 20.0
#: The requests that an engine works on and is given ahead.
IN_FLIGHT_MOST = ROWS + ROWS // 4
#: The same, and what it answers in two seconds.
REPEATED_MOST = IN_FLIGHT_MOST + int(2 / STEP_SECONDS) * ROWS
_SLOPE_SECONDS, _FLAT_SECONDS = 300.0, 1_800.0
FLAT_MIB_PER_HOUR = 4.0
_EXPECTED = re.compile(r"by a magic prompt|^redis\.exceptions\.|^kombu\.exceptions\.")
#: Matches the beginning of a traceback that is not the second of a chain.
_ALONE = re.compile(r"(?<!occurred:\n\n)(?<!exception:\n\n)(?=Traceback \(most recent call last\))")


def oracle(world: World, *, closed: bool) -> list[str]:
    """The oracle's sentences. A SQLite store is copied first, since a long look shuts everybody out."""
    if world.postgresql is not None:
        return violations(world.store, closed=closed)
    copy = world.folder / "copy.db"
    with closing(sqlite3.connect(world.settings.database_file)) as source, closing(sqlite3.connect(copy)) as target:
        source.backup(target)
    store = Store(f"sqlite:///{copy}")
    found = violations(store, closed=closed)
    store.close()
    copy.unlink()
    return found


def check_end(world: World, posts: list[Post], load: Load) -> None:
    """Everything has ended: nothing may be left, and everything has to be right."""
    for asked in load.open_jobs:
        job = world.store.jobs.job(asked.id)
        world.problem(f"job {asked.id} has not ended: {job.state.value}, {job.counts}")
    for sentence in oracle(world, closed=True):
        world.problem(f"oracle: {sentence}")
    checked = world.command("db", "check")
    if checked.returncode != 0:
        world.problem(f"db check: {checked.stdout}{checked.stderr}")
    load.check_unchanged()
    _check_jobs(world, load)
    _check_spools(world)
    for process in _processes_of(world):
        world.problem(f"a process is left: {process.pid} {' '.join(process.cmdline())[-120:]}")
        process.kill()
    for post in posts:
        _check_log(world, world.logs / f"{post.name}.log")


def _check_jobs(world: World, load: Load) -> None:
    with world.store.database.read() as connection:
        count = connection.scalar(text("SELECT count(*) FROM jobs WHERE state <> 'loading'"))
    if count != load.totals["jobs"]:
        world.problem(f"{load.totals['jobs']} jobs were submitted, and {count} are there")


def _check_spools(world: World) -> None:
    """A spool of a host that died stays a day by design, once others have answered its requests; no other may."""
    hosts = text("SELECT id FROM workers WHERE host <> :here")
    with world.store.database.read() as connection:
        elsewhere = set(connection.scalars(hosts, {"here": socket.gethostname()}))
    for path in (world.home / "spool").glob("*"):
        worker_id = int(path.stem.split("-")[1])
        if worker_id in elsewhere:
            world.note("a spool of a dead host is left, as it may be", file=path.name)
        else:
            world.problem(f"a spool is left: {path.name}, {path.stat().st_size} bytes")


def _processes_of(world: World) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get("BATCHMILL_HOME") == str(world.home):
                found.append(process)
    return found


def _check_log(world: World, path: Path) -> None:
    """A traceback is a problem, unless a magic prompt asked for it, or Celery tells of a Redis that is away."""
    blocks = _ALONE.split(path.read_text(errors="replace"))[1:]
    kinds = Counter(_last_error(block) for block in blocks)
    for line, count in kinds.items():
        if _EXPECTED.search(line):
            world.note("tracebacks, as expected", log=path.name, count=count, end=line, aloud=False)
        else:
            world.problem(f"{path.name} has {count} tracebacks that end with: {line}")


def _last_error(block: str) -> str:
    """The error line of the last traceback of a chain: the first line after its frames that is not indented."""
    lines = block.rpartition("Traceback (most recent call last)")[2].splitlines()[1:]
    return next((line for line in lines if line and not line.startswith((" ", "\t", "|"))), "?")


# --- repeats --------------------------------------------------------------------------------------------------------


def repeats(world: World) -> dict[tuple[int, int], int]:
    """Answers that each child process generated in vain, by (worker's id, generation): its crash lost them.

    Below 0 where another worker saved them from the spool of one that was silent and lived: they count as lost, too.
    """
    query = text("SELECT worker_id, worker_generation, succeeded, failed, error_codes FROM runs")
    saved: Counter[tuple[int, int]] = Counter()
    with world.store.database.read() as connection:
        for worker_id, generation, succeeded, failed, codes in connection.execute(query):
            poison = int((re.search(r'"poison": (\d+)', codes) or [0, 0])[1])
            saved[worker_id, generation] += succeeded + failed - poison
    return {
        (each.worker_id, each.generation): each.generated
        - each.dropped
        - each.lost
        - saved[each.worker_id, each.generation]
        for each in read_counts(world.counts)
    }


def in_flight_at(world: World, *outcomes: RunOutcome) -> Counter[tuple[int, int]]:
    """Counts the requests in flight of each process when its runs ended so: it dies once, but may freeze often."""
    query = text("SELECT worker_id, worker_generation, outcome, in_flight FROM runs WHERE finished_at IS NOT NULL")
    found: Counter[tuple[int, int]] = Counter()
    with world.store.database.read() as connection:
        for worker_id, generation, outcome, in_flight in connection.execute(query):
            if outcome in outcomes:
                found[worker_id, generation] += in_flight.count(",") + (in_flight != "[]")
    return found


# --- the table ------------------------------------------------------------------------------------------------------


class Report:
    """Gathers the rows; a bound that is broken is a problem, too."""

    def __init__(self, world: World, *, seed: int, minutes: float) -> None:
        self._world = world
        self._rows = [Row("database, seed, minutes", f"{world.database}, {seed}, {minutes:g}")]

    def print(
        self, posts: list[Post], load: Load, found: Measures, memory: Memory, faults: Counter[str], oracles: int
    ) -> None:
        self._work(load)
        self._faults(posts, faults)
        self._repeats(load)
        self._recoveries(found)
        self._ends(posts)
        self._memory(memory)
        self._rows.append(Row("oracle, looks in passing and one at the end", f"{oracles} + 1"))
        problems = self._world.problems
        self._rows.append(Row("problems", str(len(problems)), "0"))
        show(self._rows)
        for each in problems:
            print(f"PROBLEM  {each}")

    def _add(self, what: str, measured: object, wanted: str = "") -> None:
        self._rows.append(Row(what, f"{measured:,}" if isinstance(measured, int) else str(measured), wanted))

    def _work(self, load: Load) -> None:
        with self._world.store.database.read() as connection:
            states = dict(connection.execute(text("SELECT state, count(*) FROM outputs GROUP BY state")).all())
            runs = dict(connection.execute(text("SELECT outcome, count(*) FROM runs GROUP BY outcome")).all())
        self._add("requests answered", states.get("succeeded", 0))
        self._add("requests failed (poison), cancelled", f"{states.get('failed', 0):,}, {states.get('cancelled', 0):,}")
        self._add("jobs, all exported and checked twice", load.totals["jobs"])
        for name in ("submits killed", "submits repeated", "cancels", "retries"):
            self._add(name, load.totals[name])
        self._add("runs by outcome", ", ".join(f"{count:,} {name}" for name, count in sorted(runs.items())))

    def _faults(self, posts: list[Post], faults: Counter[str]) -> None:
        self._add("faults", sum(faults.values()))
        for name, count in sorted(faults.items()):
            self._add(f"  {name}", count)
        self._add("restarts of workers", sum(post.starts - 1 for post in posts))
        children = len(read_counts(self._world.counts))
        self._add("processes that held the model", children)

    def _repeats(self, load: Load) -> None:
        wasted = repeats(self._world)
        lost = in_flight_at(self._world, RunOutcome.CRASHED, RunOutcome.EXPIRED)
        in_flight = max(in_flight_at(self._world, RunOutcome.CRASHED).values(), default=0)
        crashed = {key: wasted[key] for key in lost if key in wasted}
        others = sum(max(count, 0) for key, count in wasted.items() if key not in lost)
        largest = max(crashed.values(), default=0)
        self._add("crashes with work in flight", len(crashed))
        self._add("largest in flight at a crash", in_flight, f"at most {IN_FLIGHT_MOST}")
        self._add("answers repeated after a crash, largest", largest, f"at most {REPEATED_MOST}")
        self._add("answers repeated in all", sum(max(count, 0) for count in crashed.values()))
        self._add("answers repeated with no crash", others, "0")
        self._add("answers saved from the spool of a live process", sum(max(-count, 0) for count in wasted.values()))
        refused = max((each.lost for each in read_counts(self._world.counts)), default=0)
        self._add("answers refused for a lease that was lost, largest", refused)
        if in_flight > IN_FLIGHT_MOST:
            self._world.problem(f"{in_flight} requests were in flight at a crash")
        if largest > REPEATED_MOST:
            worst = [key for key, count in crashed.items() if count > REPEATED_MOST]
            self._world.problem(f"a crash repeated {largest} answers: (worker, generation) {worst}")
        if others:
            who = {key: count for key, count in wasted.items() if count > 0 and key not in lost}
            self._world.problem(f"answers were generated in vain by processes that did not crash: {who}")

    def _recoveries(self, found: Measures) -> None:
        for kind in measures.KINDS:
            measured = found.of(kind)
            clean = [each.seconds for each in measured if not each.excused]
            longest = max((each.seconds for each in measured), default=0.0)
            says = f"{max(clean, default=0.0):.1f} s of {len(clean)}"
            if len(clean) < len(measured):
                says += f" (with other faults on top {longest:.1f} s of {len(measured)})"
            self._add(kind.name, says, f"{kind.bound_seconds:.0f} s" if kind.bound_seconds else "")

    def _ends(self, posts: list[Post]) -> None:
        ends = [each for post in posts for each in post.ends]
        longest, phase = max(ends, default=(0.0, ""))
        says = f"{longest:.1f} s ({phase}) of {len(ends)}"
        self._add("SIGTERM to exit, longest", says, f"{END_SECONDS:.0f} s")
        late = [each for each in ends if each[0] > END_SECONDS]
        if late:
            self._world.problem(f"SIGTERM to exit took longer than {END_SECONDS:.0f} s: {late}")

    def _memory(self, memory: Memory) -> None:
        for life in memory.lives(at_least_seconds=_SLOPE_SECONDS):
            if life.name.startswith("steady") or life.seconds >= _FLAT_SECONDS:
                self._add(f"memory of {life.name}", life, f"under {FLAT_MIB_PER_HOUR:g} MiB/h")
        others = [each for each in memory.lives(at_least_seconds=_SLOPE_SECONDS) if not each.name.startswith("steady")]
        if others:
            steepest = max(others, key=lambda life: life.slope_mib_per_hour())
            self._add(f"steepest of {len(others)} others that lived 6 min", f"{steepest.name}: {steepest}")
        for life in memory.lives(at_least_seconds=_FLAT_SECONDS):
            if life.slope_mib_per_hour(half=True) > FLAT_MIB_PER_HOUR:
                self._world.problem(f"memory of {life.name} grows: {life}")
