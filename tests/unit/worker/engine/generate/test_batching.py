"""The choice of waiting requests that run together."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from batchmill.worker.engine.generate.batching import (
    IDLING,
    PADDING,
    SHORT_ANSWER_TOKENS,
    SHORT_PROMPT_TOKENS,
    RequestTokens,
    plan,
)

PLENTY = 10**9
sizes = st.builds(RequestTokens, st.integers(1, 4000), st.integers(1, 4000))
queues = st.lists(sizes, min_size=1, max_size=60)


@given(queues, st.integers(1, 40), st.integers(1, 100_000))
def test_a_micro_batch_keeps_every_bound(queue: list[RequestTokens], rows: int, tokens: int) -> None:
    planned = plan(queue, rows=rows, tokens=tokens)
    chosen = [queue[place] for place in planned.places]
    prompts = [max(each.prompt, SHORT_PROMPT_TOKENS) for each in chosen]
    answers = [max(each.answer, SHORT_ANSWER_TOKENS) for each in chosen]
    assert list(planned.places) == sorted(set(planned.places))
    assert 1 <= len(chosen) <= rows
    assert len(chosen) * max(prompts) <= PADDING * sum(prompts)
    assert max(answers) <= IDLING * min(answers)
    assert planned.tokens == len(chosen) * (max(prompts) + max(answers))
    assert planned.tokens <= tokens or len(chosen) == 1


@given(queues, st.integers(1, 40), st.integers(1, 100_000))
def test_the_oldest_request_is_always_in_so_that_nothing_starves(
    queue: list[RequestTokens], rows: int, tokens: int
) -> None:
    left = list(queue)
    for _ in queue:
        if not left:
            break
        places = plan(left, rows=rows, tokens=tokens).places
        assert places[0] == 0
        left = [each for place, each in enumerate(left) if place not in places]
    assert not left


@given(st.lists(st.just(RequestTokens(100, 50)), min_size=1, max_size=80), st.integers(1, 40))
def test_equal_requests_fill_all_rows_in_their_order(queue: list[RequestTokens], rows: int) -> None:
    assert plan(queue, rows=rows, tokens=PLENTY).places == tuple(range(min(rows, len(queue))))


def test_the_nearest_lengths_join_the_oldest_request() -> None:
    queue = [
        RequestTokens(100, 50),
        RequestTokens(124, 50),
        RequestTokens(98, 50),
        RequestTokens(1000, 50),
        RequestTokens(101, 50),
        RequestTokens(90, 50),
    ]
    assert plan(queue, rows=3, tokens=PLENTY).places == (0, 2, 4)
    assert plan(queue, rows=40, tokens=PLENTY).places == (0, 1, 2, 4, 5)


def test_short_prompts_of_any_length_run_together() -> None:
    queue = [RequestTokens(length, 10) for length in range(1, SHORT_PROMPT_TOKENS + 1)]
    assert len(plan(queue, rows=40, tokens=PLENTY).places) == len(queue)


def test_short_answers_do_not_wait_for_long_ones() -> None:
    queue = [
        RequestTokens(50, 64),
        RequestTokens(50, 4000),
        RequestTokens(50, 100),
        RequestTokens(50, 128),
        RequestTokens(50, 33),
    ]
    assert plan(queue, rows=40, tokens=PLENTY).places == (0, 2, 3)
