"""The users of a soak: they submit, cancel, retry and export jobs by the real command, and check every answer.

Each prompt is like no other, so that an answer in the wrong place is seen. What a command could not do for lack of a
store is said again, under the same idempotency key.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from sqlalchemy import text

from batchmill.jobs.errors import StoreError
from batchmill.jobs.requests.states import JobState
from batchmill.producer.files.export import export
from tests.support.store.oracle import export_violations
from tests.tools.soak.world import World

_POISON = ("!kill9", "!sticky", "!segv")
_ODD = ("!slow", "!oom>5", "!oom>20")
_POISON_CODE, _CANCELLED_CODE = "poison", "cancelled"
#: A job that is open for longer than this is told of.
_LONG_SECONDS = 300.0
_MOST_SAID = 5


@dataclass(slots=True)
class Asked:
    """One job as its user knows it; `magic`: {index: what its prompt begins with}."""

    number: int
    count: int
    magic: dict[int, str]
    file: Path
    words: tuple[str, ...]
    module: str
    id: str = ""
    submitted_at: float = 0.0
    cancel_at: float | None = None
    retries_left: int = 0
    was_cancelled: bool = False
    told: bool = False
    digest: str = ""

    @property
    def prompts(self) -> list[str]:
        return [
            " ".join(filter(None, (self.magic.get(index), f"job {self.number} line {index}")))
            for index in range(self.count)
        ]

    @property
    def poison(self) -> dict[int, str]:
        return {index: _POISON_CODE for index, magic in self.magic.items() if magic in _POISON}


@dataclass(slots=True)
class Stream:
    """One user: how many jobs are open at once, and what is in them. `plain`: nothing odd, and nobody cancels."""

    name: str
    most_open: int
    counts: tuple[int, int]
    words: tuple[str, ...] = ()
    module: str = "batchmill"
    plain: bool = False
    open: list[Asked] = field(default_factory=list)


class Load(threading.Thread):
    """All users, in one thread."""

    def __init__(self, world: World, streams: list[Stream], random: Random) -> None:
        super().__init__(name="load", daemon=True)
        self._world, self._streams, self._random = world, streams, random
        self._folder = world.folder / "jobs"
        self._folder.mkdir()
        self._number = 0
        self._closing = threading.Event()
        self.over = threading.Event()
        self.done: list[Asked] = []
        self.totals: Counter[str] = Counter()

    def close(self) -> None:
        """No more jobs; the thread ends when all that are open have ended, or when it is `over`."""
        self._closing.set()

    @property
    def open_jobs(self) -> list[Asked]:
        return [each for stream in self._streams for each in stream.open]

    def run(self) -> None:
        try:
            while not self.over.is_set() and not (self._closing.is_set() and not self.open_jobs):
                for stream in self._streams:
                    self._serve(stream)
                self.over.wait(0.3)
        except Exception as error:
            self._world.problem(f"the load ended: {error!r}")
            raise

    def _serve(self, stream: Stream) -> None:
        for asked in list(stream.open):
            self._look_after(stream, asked)
        if len(stream.open) < stream.most_open and not self._closing.is_set():
            self._submit(stream)

    # --- submit ---------------------------------------------------------------------------------------------------

    def _submit(self, stream: Stream) -> None:
        asked = self._invent(stream)
        asked.file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in asked.prompts))
        words = ("submit", asked.file, "-m", "echo", *asked.words, "--idempotency-key", f"key {asked.number}")
        killed = self._random.uniform(0.2, 1.5) if self._random.random() < 0.1 else None
        while not self.over.is_set():
            done = self._world.command(*words, kill_after=killed, module=asked.module)
            if done.returncode == 0:
                break
            self.totals["submits killed" if killed else "submits repeated"] += 1
            killed = None
            time.sleep(1)
        else:
            return
        asked.id, asked.submitted_at = done.stdout.strip(), time.monotonic()
        stream.open.append(asked)
        self.totals["jobs"] += 1
        self.totals["requests"] += asked.count
        self._world.note(
            "submitted", job=asked.id, count=asked.count, words=asked.words, magic=asked.magic, aloud=False
        )

    def _invent(self, stream: Stream) -> Asked:
        random = self._random
        self._number += 1
        count = random.randint(*stream.counts)
        magic: dict[int, str] = {}
        if not stream.plain:
            for kinds, chance in ((_POISON, 0.04), (_ODD, 0.1)):
                if random.random() < chance:
                    magic |= {random.randrange(count): random.choice(kinds) for _ in range(random.randint(1, 2))}
        batch_size = random.choice((random.randint(1, 20), random.randint(20, 200), random.randint(200, 500)))
        asked = Asked(
            self._number,
            count,
            magic,
            self._folder / f"{self._number}.jsonl",
            ("--batch-size", str(batch_size), *stream.words),
            stream.module,
        )
        if not stream.plain and random.random() < 0.15:
            asked.cancel_at = time.monotonic() + random.uniform(0, 5)
            asked.retries_left = random.randint(0, 1)
        return asked

    # --- until it has ended ---------------------------------------------------------------------------------------

    def _look_after(self, stream: Stream, asked: Asked) -> None:
        try:
            job = self._world.store.jobs.job(asked.id)
        except StoreError:
            return
        if job.closed and asked.retries_left and job.state is JobState.CANCELLED:
            if self._world.command("retry", asked.id).returncode == 0:
                asked.retries_left, asked.was_cancelled = 0, False
                self.totals["retries"] += 1
                self._world.note("retried", job=asked.id, aloud=False)
        elif job.closed:
            if self._exported(asked):
                stream.open.remove(asked)
                self.done.append(asked)
        elif asked.cancel_at is not None and time.monotonic() > asked.cancel_at:
            if self._world.command("cancel", asked.id).returncode == 0:
                asked.cancel_at, asked.was_cancelled = None, True
                self.totals["cancels"] += 1
        elif time.monotonic() - asked.submitted_at > _LONG_SECONDS and not asked.told:
            asked.told = True
            self._world.note("slow job", job=asked.id, state=job.state.value, counts=str(job.counts))

    def _exported(self, asked: Asked) -> bool:
        """Exports a job that has ended, and checks it: whether that could be done."""
        out = asked.file.with_suffix(".out.jsonl")
        if self._world.command("results", asked.id, "-o", out).returncode != 0:
            return False
        data = out.read_bytes()
        asked.digest = hashlib.sha256(data).hexdigest()
        self._check(asked, data.decode().splitlines())
        out.unlink()
        asked.file.unlink()
        return True

    def _check(self, asked: Asked, lines: list[str]) -> None:
        errors = asked.poison
        rows = [json.loads(line) for line in lines]
        codes = {row["index"]: row["error"]["code"] for row in rows if row["error"]}
        if asked.was_cancelled:
            errors |= {index: code for index, code in codes.items() if code == _CANCELLED_CODE}
        self.totals["poison outputs"] += sum(code == _POISON_CODE for code in codes.values())
        found = export_violations(lines, texts=dict(enumerate(asked.prompts)), errors=errors)
        self._world.note("checked", job=asked.id, errors=dict(Counter(codes.values())), wrong=len(found), aloud=False)
        for sentence in found[:_MOST_SAID]:
            self._world.problem(f"job {asked.id}: {sentence}")
        for index in sorted(index for index, code in codes.items() if errors.get(index) != code)[:_MOST_SAID]:
            self._tell_how(asked.id, index)

    def _tell_how(self, job_id: str, index: int) -> None:
        """Writes down every run that had this request in flight."""
        query = text("""SELECT id, batch_id, worker_id, worker_generation, outcome, started_at, finished_at, in_flight
                        FROM runs WHERE job_id = :job ORDER BY id""")
        with self._world.store.database.read() as connection:
            for row in connection.execute(query, {"job": job_id}).mappings():
                in_flight = json.loads(row["in_flight"])
                if index in in_flight:
                    self._world.note("had it in flight", index=index, **{**row, "in_flight": len(in_flight)})

    # --- at the end -----------------------------------------------------------------------------------------------

    def check_unchanged(self) -> None:
        """Nothing that was ever exported has changed since."""
        out = self._folder / "again.jsonl"
        for asked in self.done:
            export(self._world.store, self._world.store.jobs.job(asked.id), out=out, form="jsonl", only="all")
            if hashlib.sha256(out.read_bytes()).hexdigest() != asked.digest:
                self._world.problem(f"job {asked.id}: its export is another than before")
