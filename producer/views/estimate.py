"""The estimate of a job's end: the tokens that are left, over the tokens per second of the workers at it.

Plain functions over what the store knows. They read nothing, and return no estimate while they do not know.
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

#: The least number of answers for an estimate, which has to reach those in flight, too; and the least seconds of work
#: for a speed.
_FEWEST_ANSWERS = 3
_FEWEST_SECONDS = 0.5
#: The least seconds for a recent speed: in fewer it varies at random.
_FEWEST_LATE_SECONDS = 5.0
#: The cost of prefilling one token, as a part of decoding one: it depends on model and device, so that the range spans
#: all of these. It matters where the prompts to come are longer or shorter than those before.
_PROMPT_TOKEN = 0.1
_PROMPT_TOKENS = (0.02, _PROMPT_TOKEN, 1.0)
#: The range reaches to each side by at least this part of the estimate, since speeds vary, and by this many standard
#: errors of the mean length.
_LEAST_MARGIN = 0.2
_STANDARD_ERRORS = 1.64
#: There is no estimate while the mean length may be more than this many times the likely one.
_UNKNOWN = 5
#: An answer that is already longer than all finished ones is taken to become this many times as long as it is; the
#: longest answer to come may become this many times as long as the longest so far.
_LONGER = 1.5
#: This many finished answers for each one that is left bound the longest of these.
_TELLING = 20
#: A sample of fewer requests says nothing about what differs along the file.
_FEWEST_SAMPLED = 32
#: A file looks sorted where one half is this many times as long as the other, and its requests are the longer ones in
#: this part of all pairs.
_SORTED_RATIO = 1.5
_SORTED_PART = 0.8
#: Bounds alone are shown where the high one is more than this many times the low one: what lies between says nothing.
_WIDE = 4


@dataclass(frozen=True, slots=True)
class Estimate:
    """The time until a job's last request is answered, and the bounds between which it likely lies."""

    seconds: float
    low_seconds: float
    high_seconds: float
    looks_sorted: bool  #: lengths grow or fall along the file, so that even the bounds mislead


def estimate(
    counts: Counts, paces: Sequence[Pace], sample: Sequence[SampledRequest], *, rows: Mapping[int, int], max_tokens: int
) -> Estimate | None:
    """Estimates when the job ends if its workers go on; None while nothing tells.

    `rows`: the requests that each worker takes at once, by its id; of live workers at the job alone.
    `max_tokens`: those of an answer whose line sets no limit.
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
    ranges = [left.seconds(weight, rate) for weight, rate in zip(_PROMPT_TOKENS, rates, strict=True)]
    changed = _changed(paces, rows)
    likely = ranges[_PROMPT_TOKENS.index(_PROMPT_TOKEN)].likely / changed
    low = min(each.low for each in ranges) / max(1.0, changed)
    high = max(each.high for each in ranges) / min(1.0, changed)
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
    """The work that is left of a job."""

    #: The answers that have not begun.
    waiting: _Range
    #: The tokens of one of these answers.
    mean: _Range
    #: The tokens of one of their prompts.
    prompt: float
    #: The tokens for which all slots have time from when nothing waits until the last answer ends; many are empty then.
    end: _Range

    def seconds(self, weight: float, rate: float) -> _Range:
        """The time for it at `rate` tokens per second, where a prompt's token counts as `weight` of an answer's."""
        parts = zip(self.waiting, self.mean, self.end, strict=True)
        return _Range(*((waiting * (mean + weight * self.prompt) + end) / rate for waiting, mean, end in parts))


@dataclass(frozen=True, slots=True)
class _InFlight:
    """The answers in flight."""

    active: int  #: their number
    slots: int  #: the slots that all workers have together
    tokens: int  #: those that these answers have so far, together

    @property
    def age(self) -> float:
        """The tokens that one of them has, on average."""
        return self.tokens / self.active


@dataclass(frozen=True, slots=True)
class _Lengths:
    """The lengths of answers, in tokens."""

    finished: Sequence[float]  #: of the finished ones, in ascending order
    longer: Sequence[float]  #: those of `finished` that the answers in flight may still reach
    longest: float  #: the longest that any answer may become


def _left(counts: Counts, sample: Sequence[SampledRequest], flight: _InFlight, *, max_tokens: int) -> _Remaining:
    """Computes what is left; answers in flight become as long, on average, as the finished ones that are longer."""
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
    """The likely length of the longest of `left` answers: what its line allows, or less where many have ended."""
    longest = longer[-1]
    if longest <= finished[-1] and len(finished) >= _TELLING * left:  # and nothing else is on its way
        allowed = min(allowed, round(longest * _LONGER))
    return max(longest, allowed)


def _mean(counts: Counts, flight: _InFlight, lengths: _Lengths, *, waiting: int) -> _Range:
    """The tokens of an answer to come: as of the finished ones and of those in flight, among which few are short."""
    whole, done = fmean(lengths.longer), counts.succeeded
    # As many as have all the tokens of a slot may be in flight since the beginning, and get as long as they can.
    old = min(1.0, flight.tokens / max(1, counts.completion_tokens + flight.tokens) * flight.slots / flight.active)
    upper = old * lengths.longest + (1 - old) * whole
    low, high = ((counts.completion_tokens + flight.active * each) / (done + flight.active) for each in (whole, upper))
    errors = _STANDARD_ERRORS * sqrt(1 / done + 1 / max(1, waiting)) / max(1.0, low)
    in_flight = [upper] * round(flight.active * len(lengths.finished) / done)
    return _Range(
        max(0.0, low * (1 - errors * pstdev(lengths.finished))),
        low,
        high * (1 + errors * pstdev([*lengths.finished, *in_flight])),
    )


def _end(counts: Counts, flight: _InFlight, lengths: _Lengths, *, waiting: int) -> _Range:
    """The tokens for which all slots have time from when nothing waits until the last answer ends."""
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
    """The likely longest of `count` answers in flight at once; long ones are frequent there, as they stay longer."""
    sums = list(accumulate(lengths))
    return lengths[min(bisect_left(sums, sums[-1] * count / (count + 1)), len(lengths) - 1)]


def _last_of(count: int, lengths: Sequence[float]) -> float:
    """The tokens that the last of `count` answers in flight likely lacks, where each began at some time before."""
    sums = list(accumulate(lengths))
    for place, each in enumerate(lengths):
        beyond = sums[-1] - sums[place] - each * (len(lengths) - place - 1)
        if beyond * (count + 1) <= sums[-1]:
            return each
    return lengths[-1]


def _answered_shares(counts: Counts, sample: Sequence[SampledRequest], *, active: int) -> _Range:
    """The share of waiting requests that will be answered, not refused: as of all so far, or of late if that differs.

    Requests in flight count as answered, since a refusal comes at once.
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
    """The tokens of a prompt to come: as of those before, in proportion to their bytes."""
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
    """The recent speed of these workers, as a part of their speed on the whole; the range spans both.

    Workers whose engine does not report answers in flight do not count: a moment before a run ends they seem slow.
    """
    telling = [each for each in paces if each.worker_id in rows and each.in_flight_tokens]
    mine = [each for each in telling if each.late_seconds >= _FEWEST_LATE_SECONDS]
    whole = sum((each.completion_tokens + each.in_flight_tokens) / each.seconds for each in mine)
    late = sum(each.late_tokens / each.late_seconds for each in mine)
    return late / whole if late and whole else 1.0


def _looks_sorted(sample: Sequence[SampledRequest]) -> bool:
    """True where prompts, or answers so far, get longer or shorter along the file."""
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


def estimated(ends: Estimate) -> str:
    """The end of a job, for people: `about 40 s (30 s to 1 min 10 s)`."""
    low, likely, high = map(duration, (ends.low_seconds, ends.seconds, ends.high_seconds))
    if ends.high_seconds > _WIDE * ends.low_seconds and low != high:
        text = f"{low} to {high}"
    else:
        text = f"about {likely}" + (f" ({low} to {high})" if low != high else "")
    return f"{text}; the file looks sorted by length, which makes this unreliable" if ends.looks_sorted else text
