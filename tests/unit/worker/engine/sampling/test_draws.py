"""Numbers from seeds, and tokens from numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batchmill.worker.engine.sampling.draws import BLOCK_TOKENS, drawn, key, numbers

LAST = 1.0 - 2.0**-53


def test_numbers_are_those_of_splitmix64() -> None:
    """The published generator's first three of the state 1234567."""
    keys, positions = np.full(3, 1234567, dtype=np.uint64), np.arange(3)
    wanted = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert numbers(keys, positions).tolist() == [(each >> 11) * 2.0**-53 for each in wanted]


def test_numbers_spread_evenly_over_keys_and_positions() -> None:
    by_position = numbers(np.full(20_000, key(1, 0), dtype=np.uint64), np.arange(20_000))
    by_choice = numbers(np.array([key(1, choice) for choice in range(20_000)], dtype=np.uint64), np.zeros(20_000, int))
    for each in (by_position, by_choice):
        counts = np.histogram(each, bins=100, range=(0.0, 1.0))[0]
        assert ((counts - 200.0) ** 2 / 200.0).sum() < 99 + 4 * (2 * 99) ** 0.5
        assert abs(np.corrcoef(each[:-1], each[1:])[0, 1]) < 0.03


def test_seeds_and_choices_have_keys_of_their_own() -> None:
    keys = {key(seed, choice) for seed in (0, 1, 2, -1, 2**63 - 1, -(2**63)) for choice in range(50)}
    assert len(keys) == 300
    assert key(None, 0) != key(None, 0)


@pytest.mark.parametrize("at", [0.0, 0.5, LAST])
@pytest.mark.parametrize("vocabulary", [1, 5, BLOCK_TOKENS, BLOCK_TOKENS + 1, 3 * BLOCK_TOKENS, 3 * BLOCK_TOKENS + 7])
def test_a_token_that_alone_is_possible_is_drawn(vocabulary: int, at: float) -> None:
    only = torch.tensor([0, vocabulary // 2, vocabulary - 1])
    probabilities = torch.zeros(3, vocabulary).scatter_(1, only[:, None], torch.tensor([[1.0], [1e-30], [0.3]]))
    where = torch.full((3, 1), at, dtype=torch.float64)
    assert torch.equal(drawn(probabilities, where, otherwise=torch.zeros(3, dtype=torch.long)), only)


@given(st.integers(1, 2_000), st.integers(0, 2**32), st.sampled_from([0.0, 1e-9, 0.3, 0.7, LAST]))
def test_the_token_is_where_the_sum_passes_the_number(vocabulary: int, seed: int, at: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    probabilities = torch.rand(1, vocabulary, generator=generator) ** 4
    probabilities *= torch.rand(1, vocabulary, generator=generator) < 0.5
    probabilities[0, vocabulary // 3] += 0.5
    token = int(drawn(probabilities, torch.tensor([[at]], dtype=torch.float64), otherwise=torch.tensor([0])))
    sums = probabilities[0].double().cumsum(0)
    before, after = sums[token] - probabilities[0, token], sums[token]
    assert probabilities[0, token] > 0
    assert before - 1e-5 * sums[-1] <= at * sums[-1] <= after + 1e-5 * sums[-1]


@pytest.mark.parametrize("vocabulary", [4, 4 * BLOCK_TOKENS])
def test_a_row_without_a_possible_token_takes_the_one_given(vocabulary: int) -> None:
    probabilities = torch.zeros(3, vocabulary)
    probabilities[1] = torch.nan
    probabilities[2, 3] = 1.0
    where = torch.full((3, 1), 0.5, dtype=torch.float64)
    assert drawn(probabilities, where, otherwise=torch.tensor([2, 1, 0])).tolist() == [2, 1, 3]
