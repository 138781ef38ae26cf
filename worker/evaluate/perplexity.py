"""Perplexity: e to the mean negative log-probability, in nats, of the tokens that came."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Perplexity:
    """Taken in pieces, summed in float64."""

    def __init__(self) -> None:
        self._nats = 0.0
        self.tokens = 0

    def take(self, log_probs: Tensor, targets: Tensor) -> None:
        """`log_probs`: float32 [places, vocabulary]; `targets`: int64 [places]."""
        came = log_probs.gather(-1, targets[:, None])
        self._nats -= came.sum(dtype=torch.float64).item()
        self.tokens += len(targets)

    @property
    def value(self) -> float:
        """Infinite where a token came that the model holds impossible."""
        mean = self._nats / self.tokens
        return math.exp(mean) if mean < math.log(1e300) else math.inf
