"""Each row's next token, against transformers' own processors."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from jobs.schema import SamplingParams
from worker.engine.sampler import DRAWS, NUCLEUS_TOKENS, RowSampler

CPU = torch.device("cpu")
DRAWN_ROWS = 20_000
VOCABULARY = 12
TOKENS = [3, 5, 5, 9]

OPTIONS: dict[str, tuple[SamplingParams, list[LogitsProcessor]]] = {
    "plain": (SamplingParams(temperature=1.0), []),
    "temperature": (SamplingParams(temperature=0.6), [TemperatureLogitsWarper(0.6)]),
    "hot": (SamplingParams(temperature=3.0), [TemperatureLogitsWarper(3.0)]),
    "top_k": (SamplingParams(temperature=1.0, top_k=4), [TopKLogitsWarper(4)]),
    "top_k of all": (SamplingParams(temperature=1.0, top_k=500), []),
    "top_p": (SamplingParams(temperature=1.0, top_p=0.8), [TopPLogitsWarper(0.8)]),
    "tiny top_p": (SamplingParams(temperature=1.0, top_p=1e-6), [TopPLogitsWarper(1e-6)]),
    "min_p": (SamplingParams(temperature=1.0, min_p=0.2), [MinPLogitsWarper(0.2)]),
    "penalty": (SamplingParams(temperature=1.0, repetition_penalty=1.8), [RepetitionPenaltyLogitsProcessor(1.8)]),
    "reward": (SamplingParams(temperature=1.0, repetition_penalty=0.5), [RepetitionPenaltyLogitsProcessor(0.5)]),
    "all": (
        SamplingParams(temperature=1.5, top_k=8, top_p=0.9, min_p=0.05, repetition_penalty=1.3),
        [
            RepetitionPenaltyLogitsProcessor(1.3),
            TemperatureLogitsWarper(1.5),
            TopKLogitsWarper(8),
            TopPLogitsWarper(0.9),
            MinPLogitsWarper(0.05),
        ],
    ),
}  # fmt: skip


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(11)


def logits(vocabulary: int = VOCABULARY) -> torch.Tensor:
    """One row of logits, of both signs."""
    return torch.randn(1, vocabulary, generator=torch.Generator().manual_seed(5)) * 1.5


def sampler(sampling: Sequence[SamplingParams], padding: Sequence[int] | None = None) -> RowSampler:
    padding = padding or [0] * len(sampling)
    return RowSampler(sampling, padding=padding, generator=generator(), device=CPU)


def next_tokens(rows: RowSampler, scores: torch.Tensor, tokens: Sequence[Sequence[int]]) -> list[int]:
    return rows(torch.tensor(tokens), scores.clone()).argmax(dim=-1).tolist()


def expected(processors: list[LogitsProcessor], scores: torch.Tensor) -> torch.Tensor:
    """The probabilities that transformers draws from."""
    return LogitsProcessorList(processors)(torch.tensor([TOKENS]), scores.clone()).softmax(dim=-1)[0]


def assert_drawn_from(probabilities: torch.Tensor, drawn: Sequence[int]) -> None:
    """A chi-square test; the draws are the same in every run, so it passes always or never."""
    counts = torch.bincount(torch.tensor(drawn), minlength=len(probabilities)).double()
    possible = probabilities > 0
    assert not counts[~possible].any(), "a token was drawn that is excluded"
    wanted = probabilities[possible].double() * len(drawn)
    squares = ((counts[possible] - wanted) ** 2 / wanted).sum().item()
    freedom = int(possible.sum()) - 1
    assert squares <= freedom + 4 * (2 * freedom) ** 0.5, (squares, freedom)


@pytest.mark.parametrize("name", OPTIONS)
def test_draws_follow_the_distribution_of_transformers(name: str) -> None:
    sampling, processors = OPTIONS[name]
    rows = sampler([sampling] * DRAWN_ROWS)
    drawn = next_tokens(rows, logits().expand(DRAWN_ROWS, -1), [TOKENS] * DRAWN_ROWS)
    assert_drawn_from(expected(processors, logits()), drawn)


def test_all_options_mix_in_one_micro_batch() -> None:
    each = DRAWN_ROWS // 4
    sampling = [params for params, _ in OPTIONS.values()]
    rows = sampler([*sampling, SamplingParams(temperature=0.0)] * each)
    count = len(sampling) + 1
    drawn = next_tokens(rows, logits().expand(count * each, -1), [TOKENS] * count * each)
    for place, (_, processors) in enumerate(OPTIONS.values()):
        assert_drawn_from(expected(processors, logits()), drawn[place::count])
    assert set(drawn[count - 1 :: count]) == {int(logits().argmax())}


def test_a_nucleus_wider_than_the_first_look_is_found() -> None:
    scores = logits(4 * NUCLEUS_TOKENS) / 10
    sampling = [SamplingParams(temperature=1.0, top_p=0.9), SamplingParams(temperature=0.01, top_p=0.9)]
    drawn = next_tokens(sampler(sampling * 20_000), scores.expand(40_000, -1), [TOKENS] * 40_000)
    assert_drawn_from(expected([TopPLogitsWarper(0.9)], scores), drawn[::2])
    assert_drawn_from(expected([TemperatureLogitsWarper(0.01), TopPLogitsWarper(0.9)], scores), drawn[1::2])


def test_greedy_rows_take_the_largest_score_after_the_penalty() -> None:
    scores = torch.tensor([[1.0, 3.0, 2.9, -1.0]])
    greedy = SamplingParams(temperature=0.0, top_p=0.1, top_k=2, seed=3)
    penalised = SamplingParams(temperature=0.0, repetition_penalty=1.2)
    assert next_tokens(sampler([greedy, penalised]), scores.expand(2, -1), [[0, 1], [0, 1]]) == [1, 2]


def test_where_no_row_asks_for_anything_the_scores_are_not_touched() -> None:
    scores = logits()
    assert sampler([SamplingParams(temperature=0.0)])(torch.tensor([TOKENS]), scores) is scores


def test_padding_is_no_token_of_the_prompt() -> None:
    penalty = SamplingParams(temperature=0.0, repetition_penalty=5.0)
    scores = torch.tensor([[2.0, 1.9, 1.8, 1.7]]).expand(2, -1)
    tokens = [[0, 0, 1, 2]] * 2
    assert next_tokens(sampler([penalty, penalty], padding=[2, 0]), scores, tokens) == [0, 3]


def draws_of(sampling: Sequence[SamplingParams], row: int, *, steps: int = DRAWS + 20) -> list[int]:
    """What one row draws in several steps, always from the same logits."""
    rows = sampler(sampling)
    scores = logits(50).expand(len(sampling), -1)
    return [next_tokens(rows, scores, [TOKENS] * len(sampling))[row] for _ in range(steps)]


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63)])
def test_a_seed_draws_the_same_alone_and_in_company(seed: int) -> None:
    seeded = SamplingParams(temperature=1.0, top_p=0.95, seed=seed)
    other = SamplingParams(temperature=0.7, top_k=3)
    alone = draws_of([seeded], 0)
    assert len(set(alone)) > 5
    assert draws_of([other, SamplingParams(temperature=0.0), other, seeded, other], 3) == alone
    assert draws_of([seeded, SamplingParams(temperature=1.0, seed=7)], 0) == alone


def test_different_seeds_and_rows_without_one_draw_differently() -> None:
    plain = SamplingParams(temperature=1.0)
    one, two = SamplingParams(temperature=1.0, seed=1), SamplingParams(temperature=1.0, seed=2)
    drawn = [draws_of([one, two, plain, plain], row) for row in range(4)]
    assert len({tuple(each) for each in drawn}) == 4
