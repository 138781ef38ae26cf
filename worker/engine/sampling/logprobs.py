"""Log probabilities of the model itself, before any option changes the logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch

#: The least log probability that is reported: JSON has no word for the -inf of an impossible token.
LEAST_LOGPROB = -9999.0
#: The alternatives that are searched at least, so that equal ones come in an order that no other row changes.
LEAST_ALTERNATIVES = 20


@dataclass(frozen=True, slots=True)
class Logprobs:
    """The float32 log probabilities of the n rows of a step that ask, on the device.

    A row that asks for fewer alternatives than another takes the first ones.
    """

    #: The places of these rows in the step, in rising order.
    places: tuple[int, ...]
    #: Of the tokens that were chosen, (n,).
    chosen: torch.Tensor
    #: The likeliest tokens, the likeliest first, (n, most that a row asks for).
    top_ids: torch.Tensor
    #: Of these tokens, in the same shape.
    top: torch.Tensor


class RawLogprobs:
    """The distributions of some rows, taken before the options and asked once the tokens are chosen."""

    def __init__(self, logits: torch.Tensor, places: torch.Tensor) -> None:
        """Takes float32 logits (all rows, vocabulary), and the places of the rows that ask, (n,)."""
        self._places = places
        self._distributions = logits.index_select(0, places).log_softmax(dim=-1).clamp_(min=LEAST_LOGPROB)

    def of(self, tokens: torch.Tensor, places: tuple[int, ...], alternatives: int) -> Logprobs:
        """Takes the tokens of all rows, (rows,), the rows that ask, and the most alternatives that one asks for."""
        chosen = self._distributions.gather(1, tokens.index_select(0, self._places)[:, None])[:, 0]
        looked_for = min(max(alternatives, LEAST_ALTERNATIVES), self._distributions.shape[1]) if alternatives else 0
        top, ids = self._distributions.topk(looked_for)
        return Logprobs(places, chosen, ids[:, :alternatives], top[:, :alternatives])
