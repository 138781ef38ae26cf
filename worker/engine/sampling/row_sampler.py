"""The sampler as a logits processor: what `generate` takes the largest score of is each row's next token.

Owns nothing but the translation; the rows of a micro-batch are the seats.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from worker.engine.sampling import Sampler
from worker.engine.tokenization import Prompt


class RowSampler:
    """Serves one micro-batch, from its first token step on: one prompt a row."""

    def __init__(self, prompts: Sequence[Prompt], *, vocabulary: int, device: torch.device) -> None:
        self._rows = range(len(prompts))
        self._sampler = Sampler(seats=len(prompts), vocabulary=vocabulary, device=device)
        for row, prompt in enumerate(prompts):
            self._sampler.enter(row, prompt.sampling, prompt=prompt.tokens, end_token_ids=prompt.end_token_ids)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Takes float32 logits (rows, vocabulary), which it may change; returns scores of the same shape.

        The tokens so far, (rows, length), are known already.
        """
        if self._sampler.greedy:
            return scores
        tokens = self._sampler.sample(self._rows, scores).tokens
        return scores.scatter_(1, tokens[:, None], torch.inf)
