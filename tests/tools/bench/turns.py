"""Contestants of one model in one quantization who decode rows in turn, each in a process of its own.

Owns who is loaded, and what becomes of one that fails: its score says why, and the others go on. It prints no table.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic

from tests.tools.bench.contestant import Contestant, ContestantError, Process, Setup
from tests.tools.bench.decoders import EngineDecoder
from tests.tools.bench.floor import Floor
from tests.tools.bench.score import Score
from tests.tools.bench.workloads import Workload, asked

#: Prompts differ at their ends by so many tokens, where they are to be read at once.
_OWN_TOKENS = 4
#: Prefill is measured with so many prompts at most: more take longer, and are read no faster.
_PREFILL_ROWS = 64
_TIME_UP = "left out: the time is up"


class Clock:
    """Time for new measurements: `seconds` from now on, None for as long as it takes."""

    def __init__(self, seconds: float | None) -> None:
        self._end = None if seconds is None else monotonic() + seconds

    @property
    def up(self) -> bool:
        return self._end is not None and monotonic() >= self._end


@dataclass(frozen=True, slots=True)
class Plan:
    """The lengths of a measurement: prompts and answers whose mean length while decoding is `context_tokens`."""

    context_tokens: int
    answer_tokens: int
    rounds: int
    threads: int

    @property
    def prompt_tokens(self) -> int:
        return self.context_tokens - self.answer_tokens // 2

    @property
    def most_tokens(self) -> int:
        return self.prompt_tokens + self.answer_tokens

    def decoding(self, folder: Path, rows: int, *, shared: bool) -> Workload:
        """Rows that decode. `shared`: all but the ends of the prompts are the same, so that whoever shares prefixes
        has them all decoding after a few steps; each row has keys and values of its own all the same.
        """
        lengths = [(self.prompt_tokens, self.answer_tokens)] * rows
        known = self.prompt_tokens - _OWN_TOKENS if shared else 0
        return asked(folder, f"{rows} rows decode", "", lengths, shared_tokens=known)

    def prefill(self, folder: Path, rows: int) -> Workload:
        lengths = [(self.prompt_tokens, 1)] * min(rows, _PREFILL_ROWS)
        return asked(folder, f"{rows} rows are read", "", lengths)


class Turns:
    """`setup` says where and how large. Scores get the floor."""

    def __init__(
        self,
        folder: Path,
        model: str,
        quantization: str,
        *,
        setup: Setup,
        plan: Plan,
        floor: Floor | None,
        clock: Clock,
    ) -> None:
        self._folder, self._model, self._quantization = folder, model, quantization
        self._setup, self._plan, self._floor, self._clock = setup, plan, floor, clock
        self._processes: dict[type[Contestant], Process] = {}
        self._unloadable: dict[type[Contestant], str] = {}

    def measure(self, kinds: Sequence[type[Contestant]], rows: int) -> list[Score]:
        """Measures each contestant with so many rows; all are compared with the first."""
        scores = [Score(self._model, self._quantization, rows, kind.name, floor=self._floor) for kind in kinds]
        for kind, score in zip(kinds, scores, strict=True):
            score.best = scores[0] if score is not scores[0] else None
            self._try(kind, score, lambda kind=kind: self._tune(kind, rows))  # type: ignore[misc]
        for number in range(self._plan.rounds):
            for kind, score in zip(kinds, scores, strict=True):
                self._say(f"{rows} rows, round {number + 1}: {kind.name}")
                self._try(kind, score, lambda kind=kind, score=score: self._run(kind, score))  # type: ignore[misc]
        return scores

    def close(self) -> None:
        for process in self._processes.values():
            process.close()

    def _workloads(self, kind: type[Contestant], rows: int) -> list[Workload]:
        """The workload that decodes, and one of prompts alone where prefill is measured in a run of its own."""
        if issubclass(kind, EngineDecoder):
            return [self._plan.decoding(self._folder, rows, shared=True), self._plan.prefill(self._folder, rows)]
        return [self._plan.decoding(self._folder, rows, shared=False)]

    def _tune(self, kind: type[Contestant], rows: int) -> None:
        if kind in self._unloadable:
            raise ContestantError(self._unloadable[kind])
        if kind not in self._processes:
            self._say(f"loading {kind.name}")
            try:
                self._processes[kind] = Process(
                    kind, self._folder, self._quantization, threads=self._plan.threads, setup=self._setup
                )
            except ContestantError as error:
                self._unloadable[kind] = str(error)
                raise
        for workload in self._workloads(kind, rows):
            self._say(f"{workload.name}, warming up: {kind.name}")
            self._processes[kind].tune(workload)

    def _run(self, kind: type[Contestant], score: Score) -> None:
        decoding, *reading = self._workloads(kind, score.rows)
        for workload, timelines in ((decoding, score.decodes), *((each, score.prefills) for each in reading)):
            timeline = self._processes[kind].run(workload).answers.timeline
            assert timeline is not None, "a decoder notes when its tokens come"
            timelines.append(timeline)
        if not reading:
            score.prefills = score.decodes
        score.prompt_tokens = (reading or [decoding])[0].prompt_tokens

    def _try(self, kind: type[Contestant], score: Score, act: Callable[[], None]) -> None:
        if self._clock.up:
            score.failed = score.failed or _TIME_UP
        if score.failed is None:
            try:
                act()
            except ContestantError as error:
                score.failed = str(error)
                if process := self._processes.pop(kind, None):
                    process.close()

    def _say(self, text: str) -> None:
        now = f"{datetime.now(UTC):%H:%M:%S}"
        print(f"{now} {self._model}, {self._quantization}: {text}", file=sys.stderr, flush=True)
