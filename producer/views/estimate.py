"""When a job ends: the tokens that are left, over the tokens per second of those who work on it.

Plain functions over what the store knows. They read nothing, and say nothing while they do not know.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import sqrt
from statistics import fmean, pstdev
from typing import NamedTuple

from batchmill.jobs.requests.states import RequestState
from batchmill.jobs.runtime.times import duration
from batchmill.jobs.store.views.jobs import Counts
from batchmill.jobs.store.views.sample import SampledRequest
from batchmill.jobs.store.views.usage import Pace

#: So many answers, as many as are in flight, and so many seconds of work are waited for.
_FEWEST_ANSWERS = 3
_FEWEST_SECONDS = 0.5
#: In fewer, a speed is a whim of the moment.
_FEWEST_LATE_SECONDS = 5.0
#: What reading a token of a prompt takes, as a part of making one of an answer: it depends on model and device, so that
#: the range is of all of these. It matters where the prompts to come are longer or shorter than those before.
_PROMPT_TOKEN = 0.1
_PROMPT_TOKENS = (0.02, _PROMPT_TOKEN, 1.0)
#: The range is this part of the estimate to each side at least, since speeds vary, and so many standard errors of the
#: mean length.
_LEAST_MARGIN = 0.2
_STANDARD_ERRORS = 1.64
#: Where a mean length may be so many times what it is taken for, nothing is known yet.
_UNKNOWN = 5
#: An answer that is longer already than all that are finished is taken to get so many times as long, and the longest
#: to come at least as many times as long as the longest of these.
_LONGER = 1.5
#: So many answers for each that is left tell how long the longest of these gets.
_TELLING = 20
#: A sample of fewer says nothing about what differs along the file.
_FEWEST_SAMPLED = 32
#: A file looks sorted where one half is so much longer than the other, and nearly each request of it than each there.
_SORTED_RATIO = 1.5
_SORTED_PART = 0.8
#: Where the most is so many times the least, what lies between says nothing.
_WIDE = 4


@dataclass(frozen=True, slots=True)
class Estimate:
    """How long until a job's last request is answered, and between which bounds that likely lies.

    `looks_sorted`: lengths grow or fall along the file, so that even the bounds mislead.
    """

    seconds: float
    low_seconds: float
    high_seconds: float
    looks_sorted: bool


def estimate(
    counts: Counts, paces: Sequence[Pace], sample: Sequence[SampledRequest], *, rows: Mapping[int, int], max_tokens: int
) -> Estimate | None:
    """When the job ends if those who work on it go on; None while nothing tells.

    `rows`: how many requests each worker takes at once, by its id, of those alone that live and work on the job.
    `max_tokens`: of an answer whose line does not say how many.
    """
    slots = min(sum(rows.values()), counts.total)
    fewest = max(_FEWEST_ANSWERS, min(slots, counts.pending))
    rates = [_tokens_per_second(paces, rows, weight) for weight in _PROMPT_TOKENS]
    if not counts.pending or counts.succeeded < fewest or not all(rates):
        return None
    tokens = sum(each.in_flight_tokens for each in paces if each.worker_id in rows)
    left = _left(counts, sample, _InFlight(min(slots, counts.pending), slots, tokens), max_tokens=max_tokens)
    if left.waiting.likely and left.mean.high > _UNKNOWN * left.mean.likely:
        return None
    found = [left.seconds(weight, rate) for weight, rate in zip(_PROMPT_TOKENS, rates, strict=True)]
    changed = _changed(paces, rows)
    likely = found[_PROMPT_TOKENS.index(_PROMPT_TOKEN)].likely / changed
    low = min(each.low for each in found) / max(1.0, changed)
    high = max(each.high for each in found) / min(1.0, changed)
    return Estimate(
        likely,
        min(low, likely * (1 - _LEAST_MARGIN)),
        max(high, likely * (1 + _LEAST_MARGIN)),
        _looks_sorted(sample),
    )


class _Range(NamedTuple):
    low: float
    likely: float
    high: float


@dataclass(frozen=True, slots=True)
class _Remaining:
    """What is left of a job. `waiting`: answers that have not begun, of `mean` tokens, and `prompt` tokens to read.

    `end`: the tokens for which there is time from when nothing waits until the last answer ends, in slots half empty.
    """

    waiting: _Range
    mean: _Range
    prompt: float
    end: _Range

    def seconds(self, weight: float, rate: float) -> _Range:
        """At this speed, where a prompt's token counts as so much of an answer's."""
        parts = zip(self.waiting, self.mean, self.end, strict=True)
        return _Range(*((waiting * (mean + weight * self.prompt) + end) / rate for waiting, mean, end in parts))


@dataclass(frozen=True, slots=True)
class _InFlight:
    """The answers on their way: how many, in how many slots, and the tokens that they have together."""

    active: int
    slots: int
    tokens: int

    @property
    def age(self) -> float:
        """The tokens that one has, on average."""
        return self.tokens / self.active


@dataclass(frozen=True, slots=True)
class _Lengths:
    """The lengths of answers: of those `finished` in order, of the `longer` ones among these that those in flight may
    get to, and the `longest` that any may have."""

    finished: Sequence[float]
    longer: Sequence[float]
    longest: float


def _left(counts: Counts, sample: Sequence[SampledRequest], flight: _InFlight, *, max_tokens: int) -> _Remaining:
    """Those in flight are counted as at least what they have: on average as finished ones that got as long."""
    finished = sorted(each.completion_tokens for each in sample if each.state is RequestState.SUCCEEDED)
    finished = finished or [round(counts.completion_tokens / counts.succeeded)]
    longer: Sequence[float] = finished[bisect_right(finished, flight.age) :] or [flight.age * _LONGER]
    allowed = max((each.max_tokens or max_tokens for each in sample), default=max_tokens)
    lengths = _Lengths(finished, longer, _longest(finished, longer, left=counts.pending, allowed=allowed))
    waiting = counts.pending - flight.active
    return _Remaining(
        _Range(*(waiting * each for each in _answered_shares(counts, sample, active=flight.active))),
        _mean(counts, flight, lengths, waiting=waiting),
        _prompt_tokens(counts, sample),
        _end(counts, flight, lengths, waiting=waiting),
    )


def _longest(finished: Sequence[float], longer: Sequence[float], *, left: int, allowed: int) -> float:
    """The longest that any of so many answers likely gets: what its line allows, or less where many have ended."""
    longest = longer[-1]
    if longest <= finished[-1] and len(finished) >= _TELLING * left:  # and nothing else is on its way
        allowed = min(allowed, round(longest * _LONGER))
    return max(longest, allowed)


def _mean(counts: Counts, flight: _InFlight, lengths: _Lengths, *, waiting: int) -> _Range:
    """The tokens of an answer to come: as of those finished and those in flight, which the short ones have left."""
    whole, done = fmean(lengths.longer), counts.succeeded
    # As many as have all the tokens of a slot may be in flight since the beginning, and get as long as they can.
    old = min(1.0, flight.tokens / max(1, counts.completion_tokens + flight.tokens) * flight.slots / flight.active)
    most = old * lengths.longest + (1 - old) * whole
    low, high = ((counts.completion_tokens + flight.active * each) / (done + flight.active) for each in (whole, most))
    errors = _STANDARD_ERRORS * sqrt(1 / done + 1 / max(1, waiting)) / max(1.0, low)
    in_flight = [most] * round(flight.active * len(lengths.finished) / done)
    return _Range(
        max(0.0, low * (1 - errors * pstdev(lengths.finished))),
        low,
        high * (1 + errors * pstdev([*lengths.finished, *in_flight])),
    )


def _end(counts: Counts, flight: _InFlight, lengths: _Lengths, *, waiting: int) -> _Range:
    """The tokens for which there is time from when nothing waits until the last answer ends."""
    slots, rest = flight.slots, flight.active * max(0.0, fmean(lengths.longer) - flight.age)
    if waiting:
        last = _last_of(flight.active, lengths.finished)
        return _Range(rest, slots * last, slots * max(lengths.longest, last))
    # The youngest in flight is as old as slots are empty; where answers are alike, all began together and are so.
    young = (flight.active - 1) / slots
    apart = min(1.0, pstdev(lengths.finished) * sqrt(counts.succeeded / slots) / max(1.0, fmean(lengths.finished)))
    last = max(0.0, _longest_of(flight.active, lengths.longer) - flight.age * (1 - young * apart))
    return _Range(rest, slots * last, slots * max(lengths.longest - flight.age * (1 - young), last))


def _longest_of(count: int, lengths: Sequence[float]) -> float:
    """The likely longest of so many answers in flight at once, of which longer ones are more, as they stay longer."""
    sums = list(accumulate(lengths))
    return lengths[min(bisect_left(sums, sums[-1] * count / (count + 1)), len(lengths) - 1)]


def _last_of(count: int, lengths: Sequence[float]) -> float:
    """What the last of so many answers in flight likely lacks, where each began at some time before."""
    sums = list(accumulate(lengths))
    for place, each in enumerate(lengths):
        beyond = sums[-1] - sums[place] - each * (len(lengths) - place - 1)
        if beyond * (count + 1) <= sums[-1]:
            return each
    return lengths[-1]


def _answered_shares(counts: Counts, sample: Sequence[SampledRequest], *, active: int) -> _Range:
    """The part of what waits that is answered rather than refused: as of all so far, or of the last if these differ.

    Those in flight are none of the refused, which are refused at once.
    """
    begun = counts.succeeded + active
    whole = begun / (begun + counts.failed)
    last = max((place for place, each in enumerate(sample) if each.state is not None), default=0)
    late = fmean(
        each.state is not RequestState.FAILED for each in sample[max(0, last + 1 - _FEWEST_SAMPLED) : last + 1]
    )
    differs = abs(late - whole) > 2 * _STANDARD_ERRORS * sqrt(whole * (1 - whole) / _FEWEST_SAMPLED)
    return _Range(late, late, late) if differs else _Range(min(whole, late), whole, max(whole, late))


def _prompt_tokens(counts: Counts, sample: Sequence[SampledRequest]) -> float:
    """The tokens of a prompt to come: as of those before, by their bytes."""
    mean = counts.prompt_tokens / (counts.succeeded + counts.failed)
    before = [each.body_bytes for each in sample if each.state is not None]
    to_come = [each.body_bytes for each in sample if each.state is None]
    if min(len(before), len(to_come)) < _FEWEST_SAMPLED:
        return mean
    return mean * fmean(to_come) / fmean(before)


def _tokens_per_second(paces: Sequence[Pace], rows: Mapping[int, int], weight: float) -> float:
    """The speed of these workers together; one that has done too little yet counts as the others do on average."""
    known = {
        each.worker_id: (each.completion_tokens + each.in_flight_tokens + weight * each.prompt_tokens) / each.seconds
        for each in paces
        if each.seconds >= _FEWEST_SECONDS and each.succeeded
    }
    return sum(known.get(each, fmean(known.values())) for each in rows) if known else 0.0


def _changed(paces: Sequence[Pace], rows: Mapping[int, int]) -> float:
    """Speed of these workers of late, as a part of that on the whole; the range is of both.

    Those whose engine does not tell of answers in flight do not count: a moment before a run ends they seem slow.
    """
    telling = [each for each in paces if each.worker_id in rows and each.in_flight_tokens]
    mine = [each for each in telling if each.late_seconds >= _FEWEST_LATE_SECONDS]
    whole = sum((each.completion_tokens + each.in_flight_tokens) / each.seconds for each in mine)
    late = sum(each.late_tokens / each.late_seconds for each in mine)
    return late / whole if late and whole else 1.0


def _looks_sorted(sample: Sequence[SampledRequest]) -> bool:
    """Whether prompts, or answers so far, get longer or shorter along the file."""
    answers = [each.completion_tokens for each in sample if each.state is RequestState.SUCCEEDED]
    return _is_sorted([each.body_bytes for each in sample]) or _is_sorted(answers)


def _is_sorted(lengths: Sequence[int]) -> bool:
    half = len(lengths) // 2
    if half < _FEWEST_SAMPLED:
        return False
    earlier, later = sorted(lengths[:half]), lengths[half:]
    shorter, longer = sorted((fmean(earlier), fmean(later)))
    before = fmean((bisect_left(earlier, each) + bisect_right(earlier, each)) / 2 / half for each in later)
    return longer > _SORTED_RATIO * shorter and not 1 - _SORTED_PART < before < _SORTED_PART


def estimated(found: Estimate) -> str:
    """When a job ends, for people: `about 40 s (30 s to 1 min 10 s)`."""
    low, likely, high = map(duration, (found.low_seconds, found.seconds, found.high_seconds))
    if found.high_seconds > _WIDE * found.low_seconds and low != high:
        said = f"{low} to {high}"
    else:
        said = f"about {likely}" + (f" ({low} to {high})" if low != high else "")
    return f"{said}; the file looks sorted by length, which makes this unreliable" if found.looks_sorted else said
