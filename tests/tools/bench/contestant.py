"""A contestant of a measurement, and the process that it lives in.

A contestant is loaded once, in a process and an environment of its own, and answers the same workload as often as it
is asked. It measures nothing; it says how many tokens it generated for each request, and the process takes the time.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter
from typing import Any, ClassVar

from tests.tools.bench.timeline import Timeline
from tests.tools.bench.workloads import Ask, Workload

#: The weights as they are, in a format without rounding; for each of the quantizations, formats are what compares.
EXACT = "exact"


@dataclass(frozen=True, slots=True)
class Setup:
    """The device and the sizes that a contestant is loaded for."""

    #: `cpu` or `cuda:N`.
    device: str = "cpu"
    #: None leaves the number to the contestant.
    rows: int | None = None
    #: None leaves the length to the contestant.
    context_tokens: int | None = None
    #: As the worker's flag of that name.
    dequantize: str = "auto"


@dataclass(frozen=True, slots=True)
class Answers:
    """The answers of one run."""

    #: Generated tokens of each request.
    counts: list[int]
    #: Ids of the generated tokens, where the contestant shows them.
    tokens: list[list[int]] | None = None
    #: Seconds of this run by part, where the contestant measures them.
    split: Mapping[str, float] = field(default_factory=dict)
    #: The time of each token, where the contestant notes it.
    timeline: Timeline | None = None

    @classmethod
    def of(cls, tokens: list[list[int]]) -> Answers:
        return cls([len(each) for each in tokens], tokens)


@dataclass(frozen=True, slots=True)
class Measured:
    """One run: its seconds, and what was generated in them."""

    seconds: float
    answers: Answers
    setting: str

    @property
    def tokens_per_second(self) -> float:
        return sum(self.answers.counts) / self.seconds


class Contestant:
    """Base class of the contestants; `load` and `run` are called in the contestant's process alone."""

    name: ClassVar[str]
    #: Modules that have to be installed.
    needs: ClassVar[tuple[str, ...]] = ()
    #: Its format of the weights for each quantization of ours, and the exact one.
    formats: ClassVar[Mapping[str, str]] = {}
    #: OpenMP's variables in its process, besides the number of threads.
    environment: ClassVar[Mapping[str, str]] = {}
    #: It is slow, and gets only so many of the requests.
    most: ClassVar[int | None] = None
    #: Requests of the run that only warms up.
    warm_up: ClassVar[int] = 8
    #: Given before it is loaded.
    setup: Setup = Setup()

    @classmethod
    def prepare(cls, folder: Path, weights: str) -> None:
        """Writes its own form of the model into that folder, where it needs one and there is none."""

    def load(self, folder: Path, weights: str, threads: int) -> None:
        """Makes the model of a folder ready."""
        raise NotImplementedError

    def settings(self, workload: Workload) -> Sequence[Any]:
        """Returns the settings to try on a workload; the fastest is measured."""
        return [""]

    def ready(self, workload: Workload, setting: Any) -> None:
        """Prepares for a workload: called once, and not measured."""

    def run(self, workload: Workload, setting: Any) -> Answers:
        raise NotImplementedError

    def close(self) -> None:
        """Ends what would keep its process alive."""

    @classmethod
    def missing(cls) -> str | None:
        """Returns the reason why it cannot take part here, or None."""
        absent = [each for each in cls.needs if importlib.util.find_spec(each) is None]
        return "not installed: make bench-peers" if absent else None


def longest_first(asks: Sequence[Ask]) -> list[int]:
    """Places of the requests, the most tokens first, so that no long one is left to run alone at the end."""
    return sorted(range(len(asks)), key=lambda place: -(asks[place].answer_tokens * 8 + len(asks[place].tokens)))


class Process:
    """A contestant in a process of its own. Every method raises ContestantError with what went wrong there."""

    def __init__(
        self, kind: type[Contestant], folder: Path, weights: str, *, threads: int, setup: Setup | None = None
    ) -> None:
        self._connection, theirs = multiprocessing.Pipe()
        given = (theirs, kind, folder, weights, threads, setup or Setup())
        with _openmp({**kind.environment, "OMP_NUM_THREADS": str(threads)}):
            context = multiprocessing.get_context("spawn")
            self._process = context.Process(target=_serve, args=given, daemon=True)
            self._process.start()
        theirs.close()
        self._receive()

    def tune(self, workload: Workload) -> None:
        """Warms up, and chooses the setting that later runs of this workload have."""
        self._ask("tune", workload)

    def run(self, workload: Workload) -> Measured:
        measured: Measured = self._ask("run", workload)
        return measured

    def close(self) -> None:
        self._connection.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _ask(self, verb: str, workload: Workload) -> Any:
        try:
            self._connection.send((verb, workload))
        except OSError as error:
            raise ContestantError("its process has died") from error
        return self._receive()

    def _receive(self) -> Any:
        try:
            value = self._connection.recv()
        except EOFError:
            self._process.join(10)
            raise ContestantError(f"its process ended with {self._process.exitcode}") from None
        if isinstance(value, ContestantError):
            raise value
        return value


class ContestantError(Exception):
    """A contestant cannot go on; the others can."""


@contextmanager
def _openmp(values: Mapping[str, str]) -> Iterator[None]:
    """While it lasts, these are the only variables of OpenMP that a new process gets."""
    before = dict(os.environ)
    for name in before:
        if name.startswith("OMP_"):
            del os.environ[name]
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _serve(
    connection: Connection, kind: type[Contestant], folder: Path, weights: str, threads: int, setup: Setup
) -> None:
    """The process: loads, then answers until the other end is closed."""
    contestant = kind()
    contestant.setup = setup
    try:
        contestant.load(folder, weights, threads)
        connection.send(None)
        chosen: dict[str, Any] = {}
        while True:
            verb, workload = connection.recv()
            if kind.most is not None:
                workload = workload.first(kind.most)
            if verb == "tune":
                chosen[workload.name] = _fastest(contestant, workload)
                connection.send(None)
            else:
                connection.send(_measure(contestant, workload, chosen[workload.name]))
    except (EOFError, KeyboardInterrupt):
        return
    except Exception as error:
        traceback.print_exc()
        connection.send(ContestantError(f"{type(error).__name__}: {error}".splitlines()[0][:120]))
    finally:
        contestant.close()


def _fastest(contestant: Contestant, workload: Workload) -> Any:
    """The setting that is measured; where there is only one, a part of the requests is enough to warm up."""
    settings = contestant.settings(workload)
    _measure(contestant, workload.first(contestant.warm_up), settings[0])
    if len(settings) == 1:
        return settings[0]
    return min(settings, key=lambda setting: _measure(contestant, workload, setting).seconds)


def _measure(contestant: Contestant, workload: Workload, setting: Any) -> Measured:
    contestant.ready(workload, setting)
    begin = perf_counter()
    answers = contestant.run(workload, setting)
    seconds = perf_counter() - begin
    wanted = [ask.answer_tokens for ask in workload.asks]
    if answers.counts != wanted:
        raise ContestantError(f"{sum(answers.counts)} tokens came of {sum(wanted)} that were asked for")
    return Measured(seconds, answers, str(setting))
