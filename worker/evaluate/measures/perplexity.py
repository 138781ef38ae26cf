"""Perplexity: e to the mean negative log-probability, in nats, of the tokens that came; and the difference of two."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PerplexityChange:
    """The mean of a token's nats above the baseline's, which is the logarithm of the ratio of both perplexities."""

    nats: float
    standard_error: float | None


class Perplexity:
    """A perplexity, taken in pieces and summed in float64; four bytes are kept of each token."""

    def __init__(self) -> None:
        self._nats = 0.0
        self._of_tokens: list[Tensor] = []
        self.tokens = 0

    def take(self, log_probs: Tensor, targets: Tensor) -> None:
        """Adds the next tokens. `log_probs`: float32 [places, vocabulary]; `targets`: int64 [places]."""
        came = log_probs.gather(-1, targets[:, None])
        self._nats -= came.sum(dtype=torch.float64).item()
        self._of_tokens.append(-came[:, 0].cpu())
        self.tokens += len(targets)

    @property
    def value(self) -> float:
        """The perplexity; infinite where a token came that the model holds impossible."""
        mean = self._nats / self.tokens
        return math.exp(mean) if mean < math.log(1e300) else math.inf

    def change(self, baseline: Perplexity) -> PerplexityChange:
        """Computes the change from the baseline's, which was taken of the same tokens in the same order."""
        more = (torch.cat(self._of_tokens) - torch.cat(baseline._of_tokens)).double()
        return PerplexityChange(more.mean().item(), standard_error(more))


def standard_error(values: Tensor) -> float | None:
    """The standard error of the mean of these numbers; None for a single one."""
    return None if len(values) < 2 else values.std().item() / math.sqrt(len(values))
