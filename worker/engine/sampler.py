"""The next token of every row of a micro-batch, each row by its own sampling parameters.

Owns the arithmetic between logits and a chosen token. It knows no tokenizer, no request and no stopping.

Each option works on the rows that ask for it and on no others, so all of them mix freely in one micro-batch, and
one that no row asks for costs nothing. Their order and meaning are those of transformers
(`generation/logits_process.py`): repetition penalty, temperature, top_k, top_p, min_p.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from transformers import LogitsProcessor

from jobs.schema import SamplingParams

#: Temperatures below this are greedy: dividing by one of them leaves nothing but the largest logit.
GREEDY_BELOW = 1e-5
#: A torch.Generator takes seeds of 64 bits; others are taken modulo this.
SEEDS = 2**64


class RowSampler(LogitsProcessor):
    """Chooses the next token of each row: it is the argmax of the scores that a call returns.

    `generate` with do_sample=False takes that argmax. `sampling` has one entry a row, and `padding` says how many
    places on the left of a row's prompt hold no token. Rows with a seed draw from generators of their own, hence
    independently of their neighbours; the others draw together from `generator`, whose device is the scores'.
    One sampler serves one micro-batch from its first token step on.
    """

    def __init__(
        self, sampling: Sequence[SamplingParams], *, padding: Sequence[int], generator: torch.Generator
    ) -> None:
        device = generator.device
        self._padding = torch.tensor(padding, device=device)[:, None]
        penalties = [_other_than(1.0, each.repetition_penalty) for each in sampling]
        self._penalty = _Asked.by(penalties, device)
        drawn = [(each.temperature or 0.0) >= GREEDY_BELOW for each in sampling]
        self._changes: list[tuple[_Asked, _Change]] = []
        for value, change in _OPTIONS:
            # On greedy rows these options change nothing: the largest score stays the largest.
            values = [value(each) if draws else None for each, draws in zip(sampling, drawn, strict=True)]
            if (asked := _Asked.by(values, device)) is not None:
                self._changes.append((asked, change))
        self._noise = _Noise.of(sampling, drawn, generator)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Takes the tokens so far (rows, length) and float32 logits (rows, vocabulary), which it may change.

        Returns scores of the same shape.
        """
        if self._penalty is not None:
            scores = self._penalty.rows_of(scores, lambda some, asked: _penalise(some, asked, tokens))
        for asked, change in self._changes:
            scores = asked.on(scores, change)
        return scores if self._noise is None else self._noise.added_to(scores)
