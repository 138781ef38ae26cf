"""What the model itself thinks of the tokens: their log probabilities before any option changes the logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch

#: What is impossible has the logarithm -inf, for which JSON has no word; what is less likely than this is told as it.
LEAST_LOGPROB = -9999.0
#: As many alternatives are looked for at least, so that equal ones come in an order that no other row changes.
LEAST_ALTERNATIVES = 20


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Of the rows of a step that ask, on the device; a row that asks for fewer alternatives takes the first ones.

    `places`: which rows these n are, in rising order. `chosen`: (n,) of the tokens that were chosen. `top_ids` and
    `top`: (n, most that a row asks for), the likeliest first. All log probabilities are float32.
    """

    places: tuple[int, ...]
    chosen: torch.Tensor
    top_ids: torch.Tensor
    top: torch.Tensor


class RawLogprobs:
    """The distributions of some rows, taken before the options and asked once the tokens are chosen."""

    def __init__(self, logits: torch.Tensor, places: torch.Tensor) -> None:
        """Takes float32 logits (all rows, vocabulary), and which rows count, (n,)."""
        self._places = places
        self._distributions = logits.index_select(0, places).log_softmax(dim=-1).clamp_(min=LEAST_LOGPROB)

    def of(self, tokens: torch.Tensor, places: tuple[int, ...], alternatives: int) -> Logprobs:
        """Takes the tokens of all rows, (rows,), the rows that count, and the most alternatives that one asks for."""
        chosen = self._distributions.gather(1, tokens.index_select(0, self._places)[:, None])[:, 0]
        looked_for = min(max(alternatives, LEAST_ALTERNATIVES), self._distributions.shape[1]) if alternatives else 0
        top, ids = self._distributions.topk(looked_for)
        return Logprobs(places, chosen, ids[:, :alternatives], top[:, :alternatives])
