"""One model in one quantization, and what each contestant does with the same workloads.

Owns the order of the runs: the contestants take turns, round after round, so that whatever else the machine does meets
all of them. It prints no table and knows no engine.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from tests.tools.bench.contestant import Contestant, ContestantError, Measured, Process
from tests.tools.bench.workloads import Workload

Kind = type[Contestant]


@dataclass(slots=True)
class Entry:
    """The runs of one contestant on one workload; `failed` says why there are none, or no more."""

    kind: Kind
    weights: str
    runs: list[Measured] = field(default_factory=list)
    failed: str | None = None


class Contest:
    """Contestants are loaded when they are first needed, and stay for the workloads that follow.

    `folder` holds the checkpoint. A contestant that fails takes no further part.
    """

    def __init__(self, folder: Path, quantization: str, *, threads: int, rounds: int) -> None:
        self._folder = folder
        self._quantization = quantization
        self._threads = threads
        self._rounds = rounds
        self._processes: dict[Kind, Process] = {}
        self._failed: dict[Kind, str] = {}

    def measure(self, kinds: Sequence[Kind], workload: Workload) -> list[Entry]:
        """Runs the workload with each contestant and returns their entries, in the order of `kinds`."""
        entries = [Entry(kind, kind.formats[self._quantization], failed=self._failed.get(kind)) for kind in kinds]
        for entry in entries:
            self._try(entry, partial(self._begin, entry, workload))
        for number in range(self._rounds):
            for entry in entries:
                _say(f"workload {workload.name}, round {number + 1}: {entry.kind.name}")
                self._try(entry, partial(self._run, entry, workload))
        return entries

    def close(self) -> None:
        for process in self._processes.values():
            process.close()

    def _begin(self, entry: Entry, workload: Workload) -> None:
        kind = entry.kind
        missing = kind.missing()
        if missing:
            raise ContestantError(missing)
        if kind not in self._processes:
            _say(f"loading {kind.name}, {entry.weights}")
            in_process(_prepare, kind, self._folder, entry.weights)
            self._processes[kind] = Process(kind, self._folder, entry.weights, threads=self._threads)
        _say(f"workload {workload.name}, warming up: {kind.name}")
        self._processes[kind].tune(workload)

    def _run(self, entry: Entry, workload: Workload) -> None:
        entry.runs.append(self._processes[entry.kind].run(workload))

    def _try(self, entry: Entry, act: Callable[[], None]) -> None:
        if entry.failed is None:
            try:
                act()
            except ContestantError as error:
                entry.failed = self._failed[entry.kind] = str(error)


def in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Runs what loads whole models in a process that ends with it. Raises ContestantError."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except Exception as error:
            raise ContestantError(f"{type(error).__name__}: {error}".splitlines()[0]) from error


def _prepare(kind: Kind, folder: Path, weights: str) -> None:
    kind.prepare(folder, weights)


def _say(text: str) -> None:
    print(f"{datetime.now(UTC):%H:%M:%S} {text}", file=sys.stderr, flush=True)
