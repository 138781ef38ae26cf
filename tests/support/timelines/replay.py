"""Jobs played again from their timelines, moment by moment, as the store would have shown them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from heapq import heapify, heapreplace
from itertools import pairwise
from pathlib import Path
from statistics import fmean

from batchmill.jobs.requests.states import RequestState
from batchmill.jobs.store.views.jobs import Counts
from batchmill.jobs.store.views.sample import SampledRequest, spread
from batchmill.jobs.store.views.usage import Pace, late_since
from batchmill.producer.views.estimate import Estimate, estimate


@dataclass(frozen=True, slots=True)
class Event:
    """One request: when it entered the engine and when its output was saved. No answer: it was refused."""

    began: float
    ended: float
    prompt_tokens: int
    completion_tokens: int
    body_bytes: int
    worker: int = 1
    max_tokens: int | None = None

    def tokens_at(self, seconds: float) -> int:
        """The tokens of its answer by then."""
        if seconds >= self.ended:
            return self.completion_tokens
        if seconds <= self.began:
            return 0
        return int(self.completion_tokens * (seconds - self.began) / (self.ended - self.began))


@dataclass(frozen=True, slots=True)
class Moment:
    """The knowledge at one time; `rows` by the worker that lives and works on it."""

    seconds: float
    counts: Counts
    paces: tuple[Pace, ...]
    sample: tuple[SampledRequest, ...]
    rows: dict[int, int]
    max_tokens: int

    @property
    def estimate(self) -> Estimate | None:
        return estimate(self.counts, self.paces, self.sample, rows=self.rows, max_tokens=self.max_tokens)


@dataclass(frozen=True, slots=True)
class Timeline:
    """A job's requests in file order, and how many a worker takes at once.

    `tells`: the engine tells how far answers in flight are. `away`: from when to when nobody worked.
    """

    events: Sequence[Event]
    rows: int
    max_tokens: int
    tells: bool = True
    away: Sequence[tuple[float, float]] = ()

    @property
    def end(self) -> float:
        return max(each.ended for each in self.events)

    @property
    def begin(self) -> float:
        return min(each.began for each in self.events)

    def at(self, seconds: float) -> Moment:
        ended = [each for each in self.events if each.ended <= seconds]
        answered = [each for each in ended if each.completion_tokens]
        counts = Counts(
            total=len(self.events),
            succeeded=len(answered),
            failed=len(ended) - len(answered),
            cancelled=0,
            prompt_tokens=sum(each.prompt_tokens for each in ended),
            completion_tokens=sum(each.completion_tokens for each in answered),
        )
        workers = sorted({each.worker for each in self.events if each.began <= seconds})
        begun = len(ended) + min(self.rows * len(workers), counts.pending)
        indexes = spread(counts.total, begun=begun)
        return Moment(
            seconds,
            counts,
            tuple(self._pace(worker, seconds) for worker in workers),
            tuple(self._sampled(index, seconds) for index in indexes),
            dict.fromkeys(workers, self.rows),
            self.max_tokens,
        )

    def moments(self, count: int = 60) -> Iterator[Moment]:
        """So many moments, evenly over its time without breaks."""
        length = self.end - self.begin
        for place in range(1, count):
            seconds = self.begin + length * place / count
            if not any(first <= seconds < last for first, last in self.away):
                yield self.at(seconds)

    def _pace(self, worker: int, seconds: float) -> Pace:
        mine = [each for each in self.events if each.worker == worker and each.began <= seconds]
        answered = [each for each in mine if each.ended <= seconds and each.completion_tokens]
        in_flight = [each for each in mine if each.ended > seconds]
        until = min(seconds, max(each.ended for each in mine))
        worked = self._worked(min(each.began for each in mine), until)
        since = late_since(self.begin, seconds)
        return Pace(
            worker,
            worked,
            len(answered),
            sum(each.prompt_tokens for each in answered),
            sum(each.completion_tokens for each in answered),
            sum(each.tokens_at(seconds) for each in in_flight) if self.tells else 0,
            min(worked, self._worked(since, until)),
            sum(
                each.tokens_at(seconds) - each.tokens_at(since) for each in mine if self.tells or each.ended <= seconds
            ),
        )

    def _worked(self, begin: float, end: float) -> float:
        """The seconds between these that were worked."""
        away = sum(max(0.0, min(last, end) - max(first, begin)) for first, last in self.away)
        return max(0.0, end - begin - away)

    def _sampled(self, index: int, seconds: float) -> SampledRequest:
        event = self.events[index]
        if event.ended > seconds:
            return SampledRequest(index, event.body_bytes, max_tokens=event.max_tokens)
        state = RequestState.SUCCEEDED if event.completion_tokens else RequestState.FAILED
        return SampledRequest(index, event.body_bytes, state, event.completion_tokens, event.max_tokens)


def simulated(
    lengths: Sequence[int],
    *,
    rows: int = 16,
    step_seconds: float = 0.05,
    workers: int = 1,
    away: Sequence[tuple[float, float]] = (),
    body_bytes: Sequence[int] = (),
    line_tokens: Sequence[int] = (),
    max_tokens: int | None = None,
) -> Timeline:
    """A job of answers of these lengths (0: refused at once), by workers that make a token of each row a step.

    `line_tokens`: the most of each that its line allows, `max_tokens`: of the others, else the length of the longest.
    `away`: from when to when nobody works; what is in flight then goes on afterwards.
    """
    free = [(0.0, worker) for worker in range(1, workers + 1) for _ in range(rows)]
    heapify(free)
    events = []
    for index, length in enumerate(lengths):
        began, worker = free[0]
        ended = began + length * step_seconds
        for first, last in away:
            if began < first < ended:
                ended += last - first
        size = body_bytes[index] if body_bytes else 100
        most = line_tokens[index] if line_tokens else None
        events.append(Event(began, ended, max(1, size // 5), length, size, worker, most))
        heapreplace(free, (ended, worker))
    return Timeline(events, rows, max_tokens or max(lengths), away=away)


def recorded(path: Path) -> Timeline:
    """A job that a mill has worked off, as tests/support/timelines/record.py wrote it down."""
    found = json.loads(path.read_text())
    events = [Event(*each) for each in found["events"]]
    timeline = Timeline(events, found["rows"], found["max_tokens"], tells=found["tells"])
    return evened(timeline) if timeline.tells else timeline


def evened(timeline: Timeline, *, step_seconds: float = 0.05) -> Timeline:
    """The same job where each token of an answer takes as long as any other.

    What other processes take from a machine's speed is left out by that, which no estimate can foresee.
    """
    times = sorted({time for each in timeline.events for time in (each.began, each.ended)})
    new = {times[0]: 0.0}
    for first, last in pairwise(times):
        in_flight = [each for each in timeline.events if each.began <= first and last <= each.ended]
        parts = [each.completion_tokens * (last - first) / (each.ended - each.began) for each in in_flight]
        new[last] = new[first] + step_seconds * (fmean(parts) if parts else 0.0)
    events = [replace(each, began=new[each.began], ended=new[each.ended]) for each in timeline.events]
    return replace(timeline, events=events)


def hastened(timeline: Timeline, *, until: float, times: float) -> Timeline:
    """The same job on a machine that is so many times as slow until this part of it."""
    turn = timeline.end * until

    def at(seconds: float) -> float:
        return seconds * times if seconds <= turn else turn * times + seconds - turn

    events = [replace(each, began=at(each.began), ended=at(each.ended)) for each in timeline.events]
    return replace(timeline, events=events)


@dataclass(frozen=True, slots=True)
class Look:
    """A moment between a tenth and nearly all of the work: the estimate, and the time that was really left."""

    estimate: Estimate | None
    left_seconds: float

    @property
    def off(self) -> float:
        """By what part of what was left the estimate missed it."""
        assert self.estimate is not None, "it knows by now"
        return abs(self.estimate.seconds / self.left_seconds - 1)

    @property
    def is_held(self) -> bool:
        """True where the range held the time that was left."""
        found = self.estimate
        return found is not None and found.low_seconds <= self.left_seconds <= found.high_seconds


def looks(timeline: Timeline, *, after: float = 0.1, before: float = 0.8, count: int = 30) -> list[Look]:
    """At so many moments of the whole, those between these parts of all tokens."""
    whole = sum(each.completion_tokens for each in timeline.events)
    found = []
    for each in timeline.moments(count):
        done = each.counts.completion_tokens + sum(pace.in_flight_tokens for pace in each.paces)
        if after <= done / whole <= before:
            found.append(Look(each.estimate, timeline.end - each.seconds))
    assert len(found) >= 3
    return found
