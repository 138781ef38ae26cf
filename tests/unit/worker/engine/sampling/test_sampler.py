"""The sampler's batch slots and order. The distributions are tested in `test_sampler_distributions`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batchmill.jobs.requests.generation import SamplingParams
from batchmill.worker.engine.sampling.sampler import Sampled, Sampler

CPU = torch.device("cpu")
#: Searched whole, in blocks, and in blocks by rows.
VOCABULARIES = (40, 700, 2_500)
PROMPT = [3, 5, 5, 9]
ENDS = [1, 4]


def sampler(vocabulary: int = VOCABULARIES[0], *, batch_slots: int = 8) -> Sampler:
    return Sampler(batch_slots=batch_slots, vocabulary=vocabulary, device=CPU)


def logits(*names: int, vocabulary: int = VOCABULARIES[0]) -> torch.Tensor:
    """Some rows of logits, the same for the same name."""
    rows = [torch.randn(vocabulary, generator=torch.Generator().manual_seed(name)) * 2 for name in names]
    return torch.stack(rows)


def packed(allowed: Sequence[Sequence[int] | None], vocabulary: int = VOCABULARIES[0]) -> torch.Tensor:
    """The bitmask that allows each row these tokens; None allows all."""
    words = np.zeros((len(allowed), (vocabulary + 31) // 32), dtype=np.uint32)
    for row, tokens in enumerate(allowed):
        for token in range(32 * words.shape[1]) if tokens is None else tokens:
            words[row, token // 32] |= np.uint32(1 << (token % 32))
    return torch.from_numpy(words.view(np.int32))


def steps(of: Sampler, batch_slot: int, count: int, *, start: int = 0, vocabulary: int = VOCABULARIES[0]) -> list[int]:
    """The tokens that one batch slot gets alone, from logits that differ from step to step."""
    return [int(of.sample([batch_slot], logits(start + step, vocabulary=vocabulary)).tokens) for step in range(count)]


def greedy(**options: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, **options)


def one(sampling: SamplingParams, scores: Sequence[float], **given: Any) -> int:
    """The next token of one sequence."""
    rows = sampler(len(scores))
    rows.enter(0, sampling, **{"prompt": [0], **given})
    return int(rows.sample([0], torch.tensor([scores])).tokens)


EVERYTHING = {
    "temperature": st.sampled_from([0.0, 0.7, 1.0, 2.0]),
    "top_p": st.sampled_from([None, 0.0, 0.5, 0.9, 0.999, 1.0]),
    "top_k": st.sampled_from([None, -1, 0, 1, 5, 3_000]),
    "min_p": st.sampled_from([None, 0.0, 0.1, 1.0]),
    "min_tokens": st.sampled_from([None, 0, 2]),
    "repetition_penalty": st.sampled_from([None, 1.0, 1.5]),
    "presence_penalty": st.sampled_from([None, 0.0, 0.8]),
    "frequency_penalty": st.sampled_from([None, -0.5, 0.5]),
    "logit_bias": st.sampled_from([None, (), ((1, 3.0), (9, -100.0))]),
    "logprobs": st.booleans(),
    "top_logprobs": st.sampled_from([None, 0, 3]),
    "seed": st.integers(-(2**63), 2**63 - 1),
}
SEQUENCES = st.lists(st.builds(SamplingParams, **EVERYTHING), min_size=1, max_size=6)


@given(SEQUENCES, st.sampled_from(VOCABULARIES), st.data())
def test_a_row_gets_the_same_whatever_the_company(
    sequences: list[SamplingParams], vocabulary: int, data: st.DataObject
) -> None:
    """Its token and its logprobs, bit for bit: alone, and among any of the others in any order at any step."""
    alone, together = [sampler(vocabulary) for _ in sequences], sampler(vocabulary)
    forbidden = data.draw(st.sampled_from([None, range(7, vocabulary, 2)]))
    for batch_slot, sampling in enumerate(sequences):
        alone[batch_slot].enter(0, sampling, prompt=PROMPT, end_token_ids=ENDS)
        together.enter(batch_slot, sampling, prompt=PROMPT, end_token_ids=ENDS)
    for _ in range(3):
        some = data.draw(st.lists(st.sampled_from(range(len(sequences))), unique=True, min_size=1))
        masks = [None if batch_slot % 2 else forbidden for batch_slot in some]
        allowed = packed(masks, vocabulary) if any(masks) else None
        sampled = together.sample(some, logits(*some, vocabulary=vocabulary), allowed=allowed)
        for place, batch_slot in enumerate(some):
            own = packed([masks[place]], vocabulary) if masks[place] else None
            wanted = alone[batch_slot].sample([0], logits(batch_slot, vocabulary=vocabulary), allowed=own)
            assert_same(sampled, place, wanted)


def assert_same(found: Sampled, place: int, wanted: Sampled) -> None:
    assert found.tokens[place] == wanted.tokens[0]
    if wanted.logprobs is None:
        assert found.logprobs is None or place not in found.logprobs.places
        return
    assert found.logprobs is not None
    row, most = found.logprobs.places.index(place), wanted.logprobs.top.shape[1]
    assert torch.equal(found.logprobs.chosen[row], wanted.logprobs.chosen[0])
    assert torch.equal(found.logprobs.top[row, :most], wanted.logprobs.top[0])
    assert torch.equal(found.logprobs.top_ids[row, :most], wanted.logprobs.top_ids[0])


def test_many_rows_of_a_large_vocabulary_get_the_same_as_each_alone() -> None:
    """Enough of them that they are worked on in several parts, and by several threads."""
    vocabulary, rows = 33_000, 70
    sampling = [
        SamplingParams(
            temperature=1.0 + batch_slot % 3,
            top_p=(None, 0.9)[batch_slot % 2],
            min_p=(None, 1e-5)[batch_slot // 2 % 2],
            seed=1,
        )
        for batch_slot in range(rows)
    ]
    alone, together = sampler(vocabulary, batch_slots=rows), sampler(vocabulary, batch_slots=rows)
    for batch_slot in range(rows):
        alone.enter(batch_slot, sampling[batch_slot], prompt=PROMPT, choice=batch_slot)
        together.enter(batch_slot, sampling[batch_slot], prompt=PROMPT, choice=batch_slot)
    scores = logits(*range(rows), vocabulary=vocabulary)
    tokens = together.sample(range(rows), scores.clone()).tokens.tolist()
    assert tokens == [
        int(alone.sample([batch_slot], scores[batch_slot : batch_slot + 1].clone()).tokens)
        for batch_slot in range(rows)
    ]
    assert len(set(tokens)) > rows // 2


MANY = SamplingParams(
    temperature=1.3,
    top_p=0.95,
    min_tokens=6,
    repetition_penalty=1.4,
    presence_penalty=0.5,
    frequency_penalty=0.9,
    seed=3,
)


@pytest.mark.parametrize("generated", [0, 1, 4, 9])
def test_a_sequence_that_was_put_back_goes_on_as_if_it_had_stayed(generated: int) -> None:
    stays, moves = sampler(), sampler()
    stays.enter(0, MANY, prompt=PROMPT, end_token_ids=ENDS)
    whole = steps(stays, 0, 20)
    moves.enter(0, MANY, prompt=PROMPT, end_token_ids=ENDS)
    assert steps(moves, 0, generated) == whole[:generated]
    moves.leave(0)
    moves.enter(0, SamplingParams(temperature=1.0, repetition_penalty=2.0), prompt=[8, 9])
    steps(moves, 0, 3)
    moves.enter(5, MANY, prompt=PROMPT, generated=whole[:generated], end_token_ids=ENDS)
    assert steps(moves, 5, 20 - generated, start=generated) == whole[generated:]


@pytest.mark.parametrize("after", [greedy(), greedy(frequency_penalty=0.1), SamplingParams(temperature=1.0, seed=2)])
def test_nothing_of_a_sequence_stays_in_its_batch_slot(after: SamplingParams) -> None:
    used, fresh = sampler(), sampler()
    everything = SamplingParams(
        temperature=0.5, top_k=2, top_p=0.5, min_p=0.5, logit_bias=((6, 100.0),), logprobs=True, top_logprobs=4, seed=9
    )
    used.enter(2, everything.over(MANY), prompt=PROMPT, end_token_ids=ENDS)
    steps(used, 2, 5)
    used.leave(2)
    for each in (used, fresh):
        each.enter(2, after, prompt=PROMPT)
    assert used.sample([2], logits(1)).logprobs is None
    fresh.sample([2], logits(1))
    assert steps(used, 2, 12) == steps(fresh, 2, 12)
    assert used.greedy == fresh.greedy == (after == greedy())


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63)])
def test_the_same_seed_draws_the_same(seed: int) -> None:
    seeded = SamplingParams(temperature=1.0, seed=seed)
    first, again = sampler(), sampler()
    first.enter(0, seeded, prompt=PROMPT)
    again.enter(3, seeded, prompt=PROMPT)
    tokens = steps(first, 0, 20)
    assert tokens == steps(again, 3, 20)
    assert len(set(tokens)) > 5


def test_seeds_choices_and_sequences_without_a_seed_draw_differently() -> None:
    rows = sampler()
    seeds = [SamplingParams(temperature=1.0, seed=seed) for seed in (1, 2, 2**64 - 1, None, None)]
    for batch_slot, sampling in enumerate(seeds):
        rows.enter(batch_slot, sampling, prompt=PROMPT)
    rows.enter(5, seeds[0], prompt=PROMPT, choice=1)
    rows.enter(6, seeds[1], prompt=PROMPT, choice=1)
    assert len({tuple(steps(rows, batch_slot, 20)) for batch_slot in range(7)}) == 7


def test_greedy_takes_the_largest_logit_whatever_is_asked_of_a_draw() -> None:
    scores = [1.0, 3.0, 2.9, -1.0]
    assert one(greedy(top_p=0.1, top_k=2, min_p=0.3, seed=3), scores) == 1
    assert one(SamplingParams(temperature=1e-6, seed=3), scores) == 1
    assert one(SamplingParams(temperature=1.0, top_p=0.0, seed=3), scores) == 1
    assert one(SamplingParams(seed=3), scores) == 1


@pytest.mark.parametrize("seed", range(5))
def test_a_top_p_of_zero_leaves_the_most_likely_token(seed: int) -> None:
    rows = sampler()
    rows.enter(0, SamplingParams(temperature=1.0, top_p=0.0, seed=seed), prompt=PROMPT)
    assert steps(rows, 0, 10) == [int(logits(step).argmax()) for step in range(10)]


def test_penalties_and_biases_hold_where_the_choice_is_greedy() -> None:
    scores = [1.0, 3.0, 2.9, -1.0]
    assert one(greedy(repetition_penalty=1.2), scores, prompt=[0, 1]) == 2
    assert one(greedy(repetition_penalty=1.2), scores, prompt=[0], generated=[1]) == 2
    assert one(greedy(presence_penalty=0.2), scores, generated=[1, 1]) == 2
    assert one(greedy(frequency_penalty=0.06), scores, generated=[1, 1]) == 2
    assert one(greedy(frequency_penalty=0.06), scores, generated=[1]) == 1
    assert one(greedy(logit_bias=((3, 5.0),)), scores) == 3


def test_presence_and_frequency_count_no_token_of_the_prompt() -> None:
    assert one(greedy(presence_penalty=2.0, frequency_penalty=2.0), [1.0, 3.0, 2.9], prompt=[1, 1]) == 1
    both = greedy(presence_penalty=2.0, repetition_penalty=1.01)
    assert one(both, [1.0, 3.0, 2.9], prompt=[1, 1]) == 1


def test_an_empty_prompt_has_no_token_to_penalise() -> None:
    assert one(greedy(repetition_penalty=9.0), [3.0, 2.9, 1.0], prompt=[]) == 0


def test_no_end_token_comes_before_min_tokens() -> None:
    rows = sampler(6)
    sampling = greedy(min_tokens=2, stop_token_ids=(3,), logit_bias=((1, 50.0), (3, 50.0)))
    rows.enter(0, sampling, prompt=[0], end_token_ids=[1, 2, 777])
    scores = torch.tensor([[0.0, 9.0, 9.0, 9.0, 5.0, 4.0]])
    assert [int(rows.sample([0], scores.clone()).tokens) for _ in range(3)] == [4, 4, 1]


def test_a_grammar_allows_and_its_neighbours_are_free() -> None:
    rows = sampler(40)
    for batch_slot in range(4):
        rows.enter(batch_slot, (greedy(), SamplingParams(temperature=1.0, seed=1))[batch_slot % 2], prompt=PROMPT)
    scores = logits(1, vocabulary=40)
    free = rows.sample([0, 1], scores.repeat(2, 1)).tokens.tolist()
    for batch_slot in range(4):
        rows.leave(batch_slot)
        rows.enter(batch_slot, (greedy(), SamplingParams(temperature=1.0, seed=1))[batch_slot % 2], prompt=PROMPT)
    allowed = packed([[33, 39], [39], None, None], 40)
    tokens = rows.sample(range(4), scores.repeat(4, 1), allowed=allowed).tokens.tolist()
    assert tokens == [33 if scores[0, 33] > scores[0, 39] else 39, 39, *free]


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_a_row_that_may_take_nothing_takes_something_and_leaves_the_others_alone(vocabulary: int) -> None:
    rows = sampler(vocabulary)
    restricted = SamplingParams(temperature=1.0, top_p=0.9, top_k=7, min_p=0.1, seed=1)
    for batch_slot, sampling in enumerate(
        [restricted, SamplingParams(temperature=1.0, top_p=0.5), greedy(), restricted]
    ):
        rows.enter(batch_slot, sampling, prompt=PROMPT)
    scores = logits(1, vocabulary=vocabulary).repeat(4, 1)
    scores[1] = torch.nan
    tokens = rows.sample(range(4), scores, allowed=packed([[], None, [], None], vocabulary)).tokens
    assert ((tokens >= 0) & (tokens < vocabulary)).all()
    rows.leave(3)
    rows.enter(3, restricted, prompt=PROMPT)
    assert rows.sample([3], logits(1, vocabulary=vocabulary)).tokens[0] == tokens[3]


def test_logprobs_are_the_models_own() -> None:
    rows = sampler()
    changed = SamplingParams(temperature=3.0, top_k=9, repetition_penalty=5.0, logit_bias=((2, 9.0),), logprobs=True)
    rows.enter(0, greedy(), prompt=PROMPT)
    rows.enter(1, changed, prompt=PROMPT)
    rows.enter(2, greedy(logprobs=True, top_logprobs=5), prompt=PROMPT)
    rows.enter(3, greedy(logprobs=True, top_logprobs=2), prompt=PROMPT)
    scores = logits(1, 2, 3, 4)
    model = scores.log_softmax(dim=-1)
    sampled = rows.sample([3, 0, 2, 1], scores.clone()[[3, 0, 2, 1]])
    found = sampled.logprobs
    assert found is not None
    assert found.places == (0, 2, 3)
    wanted = [model[batch_slot, sampled.tokens[place]] for place, batch_slot in ((0, 3), (2, 2), (3, 1))]
    torch.testing.assert_close(found.chosen, torch.stack(wanted))
    top = model[[3, 2, 1]].topk(5)
    torch.testing.assert_close(found.top, top.values)
    assert torch.equal(found.top_ids, top.indices)


def test_logprobs_may_be_asked_without_alternatives() -> None:
    rows = sampler(5)
    rows.enter(0, greedy(logprobs=True), prompt=PROMPT)
    found = rows.sample([0], torch.zeros(1, 5)).logprobs
    assert found is not None
    assert found.top.shape == found.top_ids.shape == (1, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_any_precision_are_taken(dtype: torch.dtype) -> None:
    rows = sampler()
    rows.enter(0, greedy(), prompt=PROMPT)
    rows.enter(1, MANY, prompt=PROMPT)
    scores = logits(1, 2).to(dtype)
    before = scores.clone()
    assert rows.sample([0], scores[:1]).tokens.tolist() == [int(before[0].float().argmax())]
    assert rows.sample([0, 1], scores).tokens.dtype == torch.int64
    assert torch.equal(scores, before)
