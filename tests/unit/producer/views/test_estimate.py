"""The estimate of a job's end: replayed from its timeline, it is near the time that was really left."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from batchmill.producer.views.estimate import Estimate, estimate, estimated
from tests.support.paths import ROOT
from tests.support.timelines.replay import Moment, Timeline, hastened, looks, recorded, simulated

Shape = Callable[[random.Random], int]
UNIFORM: dict[str, Shape] = {
    "all the same": lambda _: 100,
    "50 to 150": lambda numbers: numbers.randint(50, 150),
    "1 to 200": lambda numbers: numbers.randint(1, 200),
}
TAILS: dict[str, Shape] = {
    "lognormal": lambda numbers: max(1, min(1_000, int(numbers.lognormvariate(3.5, 1.0)))),
    "pareto": lambda numbers: min(1_000, int(20 * numbers.paretovariate(2.0))),
    "many cut short": lambda numbers: 256 if numbers.random() < 0.3 else numbers.randint(1, 40),
}
RECORDED = ROOT / "tests/support/timelines/recorded"


def lengths(shape: Shape, count: int, *, seed: int = 1) -> list[int]:
    numbers = random.Random(seed)
    return [shape(numbers) for _ in range(count)]


def known(moment: Moment) -> Estimate:
    end = moment.estimate
    assert end is not None
    return end


def half_way(timeline: Timeline) -> Moment:
    return timeline.at(timeline.end / 2)


@pytest.mark.parametrize("shape", UNIFORM)
@pytest.mark.parametrize(("count", "rows"), [(600, 8), (1_200, 16), (2_000, 64)])
def test_uniform_lengths_are_met_within_a_fifth_after_a_tenth_of_the_work(shape: str, count: int, rows: int) -> None:
    for each in looks(simulated(lengths(UNIFORM[shape], count), rows=rows)):
        assert each.off < 0.2


@pytest.mark.parametrize("tail", ["lognormal", "many cut short"])
@pytest.mark.parametrize(("count", "rows"), [(800, 8), (1_600, 16)])
@pytest.mark.parametrize("seed", range(2))
def test_heavy_tails_are_met_within_two_fifths_with_a_hundred_requests_a_row(
    tail: str, count: int, rows: int, seed: int
) -> None:
    for each in looks(simulated(lengths(TAILS[tail], count, seed=seed), rows=rows)):
        assert each.off < 0.4


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize(("count", "rows"), [(100, 8), (600, 8), (1_000, 64), (300, 64), (500, 256)])
def test_the_range_holds_what_was_left_where_few_requests_a_row_tell_too_little(
    tail: str, count: int, rows: int
) -> None:
    """Few requests a row, so that the longest answers, which nobody has seen yet, decide when the job ends."""
    timelines = [simulated(lengths(TAILS[tail], count, seed=seed), rows=rows) for seed in range(4)]
    moments = [each for timeline in timelines for each in looks(timeline, before=1.0, count=20)]
    said = [each for each in moments if each.estimate is not None]
    assert sum(each.is_held for each in said) >= 0.8 * len(said)


@pytest.mark.parametrize("path", sorted(RECORDED.glob("*.json")), ids=lambda path: path.stem)
def test_recorded_jobs_are_met(path: Path) -> None:
    moments = looks(recorded(path))
    tolerance = 0.4 if "tail" in path.stem else 0.2
    assert all(each.off < tolerance for each in moments), [(each.off, each.estimate) for each in moments]
    assert sum(each.is_held for each in moments) >= 0.8 * len(moments)


@pytest.mark.parametrize("tells", [True, False])
@pytest.mark.parametrize(("rows", "says"), [(8, True), (64, True), (8, False), (32, False)])
def test_the_upper_end_is_not_that_of_answers_that_no_line_allows(rows: int, says: bool, tells: bool) -> None:
    """A slow worker, of a job whose flags allow far longer answers than its lines do, where these say so, or than any
    gets."""
    allowed = lengths(lambda numbers: numbers.randint(8, 64), 3_000)
    numbers = random.Random(1)
    answers = [numbers.randint(each // 4, each) for each in allowed]
    timeline = simulated(answers, rows=rows, step_seconds=6.0, line_tokens=allowed if says else (), max_tokens=256)
    moments = looks(replace(timeline, tells=tells), after=0.2, before=1.0, count=100)
    near = [each.estimate is not None and each.estimate.high_seconds <= 3 * each.left_seconds for each in moments]
    assert sum(near) >= 0.9 * len(near)
    ten_left = replace(timeline, tells=tells).at(sorted(each.ended for each in timeline.events)[-11])
    assert known(ten_left).high_seconds <= 6.0 * 100


def test_there_are_recorded_jobs() -> None:
    assert {path.stem for path in RECORDED.glob("*.json")} == {"demo_tail", "demo_uniform", "echo"}


def test_hours_without_work_change_nothing() -> None:
    timeline = simulated(lengths(UNIFORM["50 to 150"], 600), rows=16, away=[(60.0, 7_200.0)])
    moment = timeline.at(7_260.0)
    assert known(moment).seconds == pytest.approx(timeline.end - 7_260.0, rel=0.2)


def test_the_range_is_of_the_whole_speed_and_of_that_of_late() -> None:
    half = half_way(simulated(lengths(UNIFORM["50 to 150"], 600), step_seconds=0.5))
    before = known(half)
    slower = replace(half, paces=tuple(replace(each, late_tokens=each.late_tokens / 4) for each in half.paces))
    assert known(slower).seconds == pytest.approx(4 * before.seconds)
    assert known(slower).high_seconds == pytest.approx(4 * before.high_seconds, rel=0.2)
    assert known(slower).low_seconds == pytest.approx(before.seconds, rel=0.2)


def test_a_machine_that_gets_faster_is_believed() -> None:
    """The core that a neighbour took for the first tenth of a job says nothing of the rest, once a third is done."""
    timeline = hastened(simulated(lengths(UNIFORM["50 to 150"], 3_000), rows=64), until=0.1, times=3.0)
    for each in looks(timeline, after=0.35):
        assert each.off < 0.2
        assert each.is_held


def test_several_workers_are_as_fast_as_all_of_them_and_dead_ones_as_none() -> None:
    timeline = simulated(lengths(UNIFORM["50 to 150"], 1_200), workers=2)
    assert all(each.off < 0.2 for each in looks(timeline))
    half = half_way(timeline)
    alone, joined = replace(half, rows={1: 16}), replace(half, rows={1: 16, 2: 16, 3: 16})
    assert known(alone).seconds == pytest.approx(2 * known(half).seconds, rel=0.1)
    assert known(joined).seconds < known(half).seconds, "a new one is taken to be like the others"
    assert replace(half, rows={}).estimate is None


def test_it_measures_until_as_many_are_answered_as_are_in_flight() -> None:
    timeline = simulated([100] * 64)
    assert timeline.at(4.9).estimate is None
    assert timeline.at(5.1).estimate is not None
    one_by_one = simulated([100 + number for number in range(64)])
    assert [one_by_one.at(seconds).counts.succeeded for seconds in (5.01, 5.71)] == [1, 15]
    assert [one_by_one.at(seconds).estimate for seconds in (5.01, 5.71)] == [None, None]
    assert one_by_one.at(5.76).estimate is not None
    few = simulated([100] * 5)
    assert all(each.estimate is None for each in few.moments())


def test_it_says_nothing_once_nothing_is_pending() -> None:
    timeline = simulated([100] * 64)
    assert timeline.at(timeline.end).estimate is None


def test_it_measures_while_the_mean_length_may_be_far_longer() -> None:
    """Short answers end first, and say nothing of the long ones that are still in flight."""
    early = simulated([1_000 if index % 10 == 0 else 2 for index in range(400)]).at(2.5)
    assert early.counts.succeeded > 100
    assert early.estimate is None


def test_a_worker_that_only_refused_prompts_counts_as_the_others_do() -> None:
    half = half_way(simulated(lengths(UNIFORM["50 to 150"], 600)))
    (pace,) = half.paces
    refusing = replace(pace, worker_id=2, succeeded=0, prompt_tokens=10, completion_tokens=0, in_flight_tokens=0)
    joined = replace(half, rows={1: 16, 2: 16})
    assert known(replace(joined, paces=(pace, refusing))).seconds == pytest.approx(known(joined).seconds)


def test_those_in_flight_count_as_at_least_what_they_have() -> None:
    many = [*lengths(UNIFORM["1 to 200"], 200), 5_000, *[1] * 15]
    timeline = simulated(many)
    begin = timeline.events[200].began
    moment = timeline.at(begin + 0.05 * 2_000)
    assert moment.counts.pending == 1
    left = known(moment)
    assert left.seconds > 0.05 * 500
    assert left.high_seconds >= 0.05 * 3_000


def test_refused_prompts_are_no_throughput() -> None:
    burst = simulated([0] * 500 + lengths(UNIFORM["50 to 150"], 600))
    for each in looks(burst):
        assert each.off < 0.2
        assert each.is_held
    numbers = random.Random(1)
    mixed = simulated([numbers.choice((0, 0, each)) for each in lengths(UNIFORM["50 to 150"], 1_800)])
    assert all(each.off < 0.25 for each in looks(mixed))


def test_prompts_count_by_their_bytes() -> None:
    answers = lengths(UNIFORM["50 to 150"], 600)
    even = half_way(simulated(answers))
    later = half_way(simulated(answers, body_bytes=[100 if index < 350 else 1_000 for index in range(600)]))
    assert known(later).seconds > 1.1 * known(even).seconds
    assert known(later).high_seconds > 1.5 * known(even).high_seconds


def test_a_file_that_is_sorted_is_said_to_mislead() -> None:
    answers = lengths(UNIFORM["1 to 200"], 600)
    rising = half_way(simulated(sorted(answers)))
    assert known(rising).looks_sorted
    numbers = random.Random(1)
    sizes = [numbers.randint(100, 2_000) for _ in answers]
    assert known(half_way(simulated(answers, body_bytes=sorted(sizes, reverse=True)))).looks_sorted
    assert not known(half_way(simulated(answers, body_bytes=sizes))).looks_sorted
    numbered = [len(f"what is {index}?") for index in range(600)]
    assert not known(half_way(simulated(answers, body_bytes=numbered))).looks_sorted


@pytest.mark.parametrize("tail", TAILS)
def test_no_heavy_tail_is_taken_for_a_sorted_file(tail: str) -> None:
    for seed in range(5):
        answers = lengths(TAILS[tail], 600, seed=seed)
        assert not any(found.looks_sorted for each in simulated(answers).moments(10) if (found := each.estimate))


def test_answers_without_a_token_are_answers() -> None:
    half = half_way(simulated([100] * 600))
    counts = replace(half.counts, completion_tokens=0)
    paces = [replace(each, completion_tokens=0, in_flight_tokens=0) for each in half.paces]
    sample = [replace(each, completion_tokens=0) for each in half.sample]
    end = estimate(counts, paces, sample, rows=half.rows, max_tokens=1)
    assert end is not None
    assert end.low_seconds <= end.seconds <= end.high_seconds


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (Estimate(40.0, 30.0, 70.0, False), "about 40 s (30 s to 1 min 10 s)"),
        (Estimate(40.2, 40.1, 40.3, False), "about 40 s"),
        (Estimate(5.0, 1.0, 60.0, False), "1 s to 1 min 0 s"),
        (
            Estimate(40.0, 30.0, 70.0, True),
            "about 40 s (30 s to 1 min 10 s); the file looks sorted by length, which makes this unreliable",
        ),
    ],
)
def test_estimates_for_people(found: Estimate, said: str) -> None:
    assert estimated(found) == said
