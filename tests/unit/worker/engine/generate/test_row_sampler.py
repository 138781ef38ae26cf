"""The sampler inside of `generate`: the largest score of a row is its next token."""

from __future__ import annotations

from typing import Any

import torch

from batchmill.jobs.requests.generation import SamplingParams
from batchmill.worker.engine.generate.row_sampler import RowSampler
from batchmill.worker.engine.sampling.sampler import Sampler
from batchmill.worker.engine.text.tokenization import Prompt

CPU = torch.device("cpu")


def prompt(*tokens: int, end: int = 1, **sampling: Any) -> Prompt:
    return Prompt(tokens, 9, SamplingParams(**sampling), (), frozenset([end]), ())


def next_tokens(rows: RowSampler, scores: torch.Tensor) -> list[int]:
    """The tokens that `generate` takes; the tokens so far, padded on the left, do not matter."""
    return rows(torch.zeros(len(scores), 5, dtype=torch.long), scores.clone()).argmax(dim=-1).tolist()


def test_the_largest_score_is_the_token_that_the_sampler_chose() -> None:
    prompts = [
        prompt(3, 5, temperature=1.0, seed=1),
        prompt(0, temperature=0.0),
        prompt(3, temperature=2.0, top_p=0.9, frequency_penalty=1.0, seed=2),
    ]
    rows, sampler = RowSampler(prompts, vocabulary=30, device=CPU), Sampler(batch_slots=3, vocabulary=30, device=CPU)
    for batch_slot, each in enumerate(prompts):
        sampler.enter(batch_slot, each.sampling, prompt=each.tokens)
    scores = torch.randn(3, 30, generator=torch.Generator().manual_seed(1))
    for _ in range(10):
        assert next_tokens(rows, scores) == sampler.sample(range(3), scores.clone()).tokens.tolist()


def test_each_row_is_penalised_for_its_own_prompt() -> None:
    prompts = [
        prompt(1, 2, temperature=0.0, repetition_penalty=5.0),
        prompt(0, temperature=0.0, repetition_penalty=5.0),
    ]
    rows = RowSampler(prompts, vocabulary=4, device=CPU)
    assert next_tokens(rows, torch.tensor([[1.7, 2.0, 1.9, 1.8]]).expand(2, -1)) == [3, 1]


def test_min_tokens_hold_back_each_rows_own_ends() -> None:
    asked = {"temperature": 0.0, "min_tokens": 2}
    rows = RowSampler([prompt(0, **asked), prompt(0, end=2, **asked)], vocabulary=4, device=CPU)
    scores = torch.tensor([[0.0, 3.0, 2.0, 1.0], [0.0, 2.0, 3.0, 1.0]])
    assert [next_tokens(rows, scores) for _ in range(3)] == [[2, 1], [2, 1], [1, 2]]


def test_where_no_row_asks_for_anything_the_scores_are_not_touched() -> None:
    scores = torch.randn(2, 8)
    rows = RowSampler([prompt(1, temperature=0.0), prompt(2, temperature=0.0)], vocabulary=8, device=CPU)
    assert rows(torch.zeros(2, 1, dtype=torch.long), scores) is scores
