"""The sampler as a logits processor: it gives each row's next token the largest score, which `generate` takes.

Owns this translation, and the rows whose logits are no numbers; the rows of a micro-batch are the batch slots.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from batchmill.worker.engine.sampling.sampler import Sampler
from batchmill.worker.engine.text.tokenization import Prompt


class RowSampler:
    """Serves one micro-batch, from its first token step on: one prompt a row."""

    def __init__(self, prompts: Sequence[Prompt], *, vocabulary: int, device: torch.device) -> None:
        self._rows = range(len(prompts))
        #: Rows whose logits were numbers at every step so far, (rows,) of bool, on the device.
        self.sound = torch.ones(len(prompts), dtype=torch.bool, device=device)
        self._sampler = Sampler(batch_slots=len(prompts), vocabulary=vocabulary, device=device)
        for row, prompt in enumerate(prompts):
            self._sampler.enter(row, prompt.sampling, prompt=prompt.tokens, end_token_ids=prompt.end_token_ids)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Takes float32 logits (rows, vocabulary), which it may change; returns scores of the same shape.

        The tokens so far, (rows, length), are known already.
        """
        sampled = self._sampler.sample(self._rows, scores)
        self.sound &= sampled.sound
        if self._sampler.greedy:
            return scores
        return scores.scatter_(1, sampled.tokens[:, None], torch.inf)
