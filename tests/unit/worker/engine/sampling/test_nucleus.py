"""The tokens that top_k, top_p and min_p leave, by both ways to find the smallest kept probability."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LogitsProcessorList, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from batchmill.worker.engine.sampling.nucleus import SORTED_VOCABULARY, Limits, restrict

#: A trained model's, where few tokens matter, and one where most do.
SCALES = (4.0, 0.1)
VOCABULARIES = (50, SORTED_VOCABULARY, SORTED_VOCABULARY + 1, 9_000)


def limits(*rows: tuple[int, float, float]) -> Limits:
    top_k, top_p, min_p = zip(*rows, strict=True)
    return Limits(np.array(top_k), np.array(top_p), np.array(min_p))


def logits(vocabulary: int, scale: float, rows: int) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(vocabulary)) * scale


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_what_is_left_is_what_transformers_leaves(vocabulary: int, scale: float) -> None:
    asked = [(0, 1.0, 0.0), (7, 1.0, 0.0), (0, 0.9, 0.0), (20, 0.5, 0.0), (0, 0.3, 0.9), (0, 1.0, 0.2), (0, 0.0, 0.0)]
    scores = logits(vocabulary, scale, len(asked))
    probabilities = scores.softmax(dim=-1)
    before = probabilities.clone()
    restrict(probabilities, limits(*asked))
    for row, (top_k, top_p, min_p) in enumerate(asked):
        processors = LogitsProcessorList([TopKLogitsWarper(top_k or vocabulary), TopPLogitsWarper(top_p)])
        if min_p:
            processors.append(MinPLogitsWarper(min_p))
        wanted = processors(torch.tensor([[0]]), scores[row : row + 1])[0] > -torch.inf
        # Both add up tens of thousands of numbers, and stop at the same one but for rounding.
        assert (wanted != (probabilities[row] > 0)).sum() <= (1 if scale < 1.0 and 0.0 < top_p < 1.0 else 0), asked[row]
        kept = probabilities[row] > 0
        assert torch.equal(probabilities[row][kept], before[row][kept])


@pytest.mark.parametrize("vocabulary", [8, 4_000])
@pytest.mark.parametrize("asked", [(2, 1.0, 0.0), (0, 0.2, 0.0), (2, 0.1, 0.9)])
def test_equal_probabilities_are_kept_or_excluded_together(vocabulary: int, asked: tuple[int, float, float]) -> None:
    probabilities = torch.full((1, vocabulary), 0.1 / vocabulary)
    probabilities[0, :4] = 0.225
    restrict(probabilities, limits(asked))
    assert probabilities[0].nonzero()[:, 0].tolist() == [0, 1, 2, 3]
