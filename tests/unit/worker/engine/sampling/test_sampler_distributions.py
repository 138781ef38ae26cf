"""The sampler's draws, option by option and all together, against the distributions of transformers' processors."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from batchmill.jobs.requests.generation import SamplingParams
from batchmill.worker.engine.sampling.sampler import Sampler

CPU = torch.device("cpu")
SAMPLES = 3_000
VOCABULARY = 12
PROMPT, GENERATED = [3, 5, 5, 9], [7, 3, 7]
ENDS = [1, 4]
BIAS = ((2, 2.5), (7, -1.5), (0, -100.0))


class Counted(LogitsProcessor):
    """Presence and frequency penalties as OpenAI's API defines them."""

    def __init__(self, presence: float, frequency: float) -> None:
        self.presence, self.frequency = presence, frequency

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        counts = torch.bincount(torch.tensor(GENERATED), minlength=scores.shape[1])
        return scores - self.frequency * counts - self.presence * (counts > 0)


def bias(pairs: Sequence[tuple[int, float]] = BIAS) -> LogitsProcessor:
    return SequenceBiasLogitsProcessor([[[token], value] for token, value in pairs])


def min_tokens(count: int) -> LogitsProcessor:
    return MinNewTokensLengthLogitsProcessor(len(PROMPT), count, ENDS)


OPTIONS: dict[str, tuple[SamplingParams, list[LogitsProcessor]]] = {
    "plain": (SamplingParams(temperature=1.0), []),
    "temperature": (SamplingParams(temperature=0.6), [TemperatureLogitsWarper(0.6)]),
    "hot": (SamplingParams(temperature=3.0), [TemperatureLogitsWarper(3.0)]),
    "top_k": (SamplingParams(temperature=1.0, top_k=4), [TopKLogitsWarper(4)]),
    "top_k of all": (SamplingParams(temperature=1.0, top_k=500), []),
    "top_p": (SamplingParams(temperature=1.0, top_p=0.8), [TopPLogitsWarper(0.8)]),
    "tiny top_p": (SamplingParams(temperature=1.0, top_p=1e-6), [TopPLogitsWarper(1e-6)]),
    "min_p": (SamplingParams(temperature=1.0, min_p=0.2), [MinPLogitsWarper(0.2)]),
    "repetition": (SamplingParams(temperature=1.0, repetition_penalty=1.8), [RepetitionPenaltyLogitsProcessor(1.8)]),
    "reward": (SamplingParams(temperature=1.0, repetition_penalty=0.5), [RepetitionPenaltyLogitsProcessor(0.5)]),
    "presence": (SamplingParams(temperature=1.0, presence_penalty=1.5), [Counted(1.5, 0.0)]),
    "frequency": (SamplingParams(temperature=1.0, frequency_penalty=-0.7), [Counted(0.0, -0.7)]),
    "logit_bias": (SamplingParams(temperature=1.0, logit_bias=BIAS), [bias()]),
    "min_tokens ahead": (SamplingParams(temperature=1.0, min_tokens=4), [min_tokens(4)]),
    "min_tokens reached": (SamplingParams(temperature=1.0, min_tokens=3), [min_tokens(3)]),
    "all": (
        SamplingParams(
            temperature=1.5,
            top_k=8,
            top_p=0.9,
            min_p=0.05,
            min_tokens=9,
            repetition_penalty=1.3,
            presence_penalty=0.4,
            frequency_penalty=0.3,
            logit_bias=BIAS,
        ),
        [
            bias(),
            min_tokens(9),
            RepetitionPenaltyLogitsProcessor(1.3),
            Counted(0.4, 0.3),
            TemperatureLogitsWarper(1.5),
            TopKLogitsWarper(8),
            TopPLogitsWarper(0.9),
            MinPLogitsWarper(0.05),
        ],
    ),
}


def logits(vocabulary: int = VOCABULARY) -> torch.Tensor:
    """One row of logits, of both signs."""
    return torch.randn(1, vocabulary, generator=torch.Generator().manual_seed(5)) * 1.5


def drawn(sampling: Sequence[SamplingParams], scores: torch.Tensor, *, samples: int) -> list[list[int]]:
    """For each of these, what so many of its rows draw, all in one call, each row as a choice of its own."""
    batch_slots = range(len(sampling) * samples)
    sampler = Sampler(batch_slots=len(batch_slots), vocabulary=scores.shape[1], device=CPU)
    for batch_slot in batch_slots:
        params = replace(sampling[batch_slot % len(sampling)], seed=11)
        sampler.enter(batch_slot, params, prompt=PROMPT, generated=GENERATED, end_token_ids=ENDS, choice=batch_slot)
    tokens = sampler.sample(batch_slots, scores.repeat(len(batch_slots), 1)).tokens
    return [tokens[place :: len(sampling)].tolist() for place in range(len(sampling))]


def expected(processors: list[LogitsProcessor], scores: torch.Tensor) -> torch.Tensor:
    """The probabilities that transformers draws from."""
    tokens = torch.tensor([PROMPT + GENERATED])
    return LogitsProcessorList(deepcopy(processors))(tokens, scores.clone()).softmax(dim=-1)[0]


def assert_drawn_from(probabilities: torch.Tensor, tokens: Sequence[int]) -> None:
    """A chi-square test; the draws are the same in every run, so it passes always or never."""
    counts = torch.bincount(torch.tensor(tokens), minlength=len(probabilities)).double()
    possible = probabilities > 0
    assert not counts[~possible].any(), "a token was drawn that is excluded"
    wanted = probabilities[possible].double() * len(tokens)
    squares = ((counts[possible] - wanted) ** 2 / wanted).sum().item()
    kinds = int(possible.sum())
    # Of a multinomial, exactly; rare tokens make it larger than the chi-square distribution's 2 * (kinds - 1).
    variance = 2 * (kinds - 1) + float((1 / wanted).sum()) - (kinds**2 + 2 * kinds - 2) / len(tokens)
    assert squares <= kinds - 1 + 4 * variance**0.5, (squares, kinds)


@pytest.mark.parametrize("name", OPTIONS)
def test_draws_follow_the_distribution_of_transformers(name: str) -> None:
    sampling, processors = OPTIONS[name]
    [tokens] = drawn([sampling], logits(), samples=SAMPLES)
    assert_drawn_from(expected(processors, logits()), tokens)


def test_all_options_mix_in_one_call() -> None:
    greedy = SamplingParams(temperature=0.0)
    *each, largest = drawn([*(sampling for sampling, _ in OPTIONS.values()), greedy], logits(), samples=1_000)
    for (_, processors), tokens in zip(OPTIONS.values(), each, strict=True):
        assert_drawn_from(expected(processors, logits()), tokens)
    assert set(largest) == {int(logits().argmax())}


@pytest.mark.parametrize("vocabulary", [600, 2_300])
@pytest.mark.parametrize("name", ["plain", "top_k", "top_p", "tiny top_p", "min_p", "all"])
def test_draws_follow_it_where_the_vocabulary_is_searched_in_parts(name: str, vocabulary: int) -> None:
    sampling, processors = OPTIONS[name]
    scores = logits(vocabulary)
    [tokens] = drawn([sampling], scores, samples=SAMPLES)
    assert_drawn_from(expected(processors, scores), tokens)


def test_one_sequence_draws_from_it_step_after_step() -> None:
    sampler = Sampler(batch_slots=1, vocabulary=VOCABULARY, device=CPU)
    sampler.enter(0, SamplingParams(temperature=1.0, seed=1), prompt=PROMPT)
    tokens = [int(sampler.sample([0], logits()).tokens) for _ in range(3_000)]
    assert_drawn_from(expected([], logits()), tokens)
    pairs = [first * VOCABULARY + second for first, second in zip(tokens[::2], tokens[1::2], strict=True)]
    single = expected([], logits())
    assert_drawn_from((single[:, None] * single).flatten(), pairs)
