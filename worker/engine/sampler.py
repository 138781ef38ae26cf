"""The next token of every row of a micro-batch, each row by its own sampling parameters.

Owns the arithmetic between logits and a chosen token. It knows no tokenizer, no request and no stopping.

Each option works on the rows that ask for it and on no others, so all of them mix freely in one micro-batch, and
one that no row asks for costs nothing. Their order and meaning are those of transformers
(`generation/logits_process.py`): repetition penalty, temperature, top_k, top_p, min_p.

A row's draw is one number of a generator of the CPU, whatever the device, and the token where the sum of the
probabilities passes it. Noise for every token of the vocabulary, as torch.multinomial draws it, takes four times
as long on a CPU, and a kernel a row on a GPU where rows have generators of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch

from jobs.schema import SamplingParams

#: Temperatures below this are greedy: dividing by one of them leaves nothing but the largest logit.
GREEDY_BELOW = 1e-5
#: A torch.Generator takes seeds of 64 bits; others are taken modulo this.
SEEDS = 2**64
#: Token steps that the generators draw for at once.
DRAWS = 64
#: A nucleus (top_p) is looked for among this many tokens first; sorting a whole vocabulary costs 15 times that.
NUCLEUS_TOKENS = 256


class _Asked(NamedTuple):
    """What some rows ask of one option: their places (None: every row), what they ask (n, 1), and its maximum."""

    rows: torch.Tensor | None
    values: torch.Tensor
    largest: float

    @classmethod
    def by(cls, values: Sequence[float | None], device: torch.device) -> _Asked | None:
        """From one value a row, None where a row does not ask; None if no row does."""
        rows = [row for row, value in enumerate(values) if value is not None]
        asked = [value for value in values if value is not None]
        if not asked:
            return None
        places = None if len(rows) == len(values) else torch.tensor(rows, device=device)
        return cls(places, torch.tensor(asked, device=device)[:, None], max(asked))

    def of(self, every_row: torch.Tensor) -> torch.Tensor:
        return every_row if self.rows is None else every_row[self.rows]

    def on(self, scores: torch.Tensor, change: _Change) -> torch.Tensor:
        """The scores with these rows changed (in place, unless they are all rows)."""
        changed = change(self.of(scores), self)
        return changed if self.rows is None else scores.index_copy_(0, self.rows, changed)


#: Takes the scores of the rows that ask (n, vocabulary) and what they ask; returns their new scores.
_Change = Callable[[torch.Tensor, _Asked], torch.Tensor]


class _Draws:
    """Numbers in [0, 1) for rows with and without a seed, one (n, 1) of float64 after the other."""

    def __init__(self, seeds: Sequence[int | None], generator: torch.Generator, device: torch.device) -> None:
        self._generators = [
            generator if seed is None else torch.Generator().manual_seed(seed % SEEDS) for seed in seeds
        ]
        self._device = device
        self._step = DRAWS

    def next(self) -> torch.Tensor:
        if self._step == DRAWS:
            drawn = [torch.rand(DRAWS, generator=each, dtype=torch.float64) for each in self._generators]
            self._ahead = torch.stack(drawn, dim=1)[..., None].to(self._device)
            self._step = 0
        self._step += 1
        return self._ahead[self._step - 1]


class RowSampler:
    """A logits processor that chooses the next token of each row: it is the argmax of the scores that a call returns.

    `generate` with do_sample=False takes that argmax. `sampling` has one entry a row, and `padding` says how many
    places on the left of a row's prompt hold no token. Rows with a seed draw from generators of their own, hence
    independently of their neighbours; the others draw from `generator`, one of the CPU. One sampler serves one
    micro-batch, from its first token step on.
    """

    def __init__(
        self,
        sampling: Sequence[SamplingParams],
        *,
        padding: Sequence[int],
        generator: torch.Generator,
        device: torch.device,
    ) -> None:
        self._padding = torch.tensor(padding, device=device)[:, None]
        self._penalty = _Asked.by([_penalty(each) for each in sampling], device)
        drawn = [each if (each.temperature or 0.0) >= GREEDY_BELOW else None for each in sampling]
        self._changes: list[tuple[_Asked, _Change]] = []
        for value_of, change in _OPTIONS:
            # A greedy row asks for none of these: they leave its largest score the largest.
            asked = _Asked.by([None if each is None else value_of(each) for each in drawn], device)
            if asked is not None:
                self._changes.append((asked, change))
        self._drawn = _Asked.by([None if each is None else 1.0 for each in drawn], device)
        self._draws = _Draws([each.seed for each in drawn if each is not None], generator, device)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Takes the tokens so far (rows, length) and float32 logits (rows, vocabulary), which it may change.

        Returns scores of the same shape.
        """
        if self._penalty is not None:
            scores = self._penalty.on(scores, partial(_penalise, tokens=self._tokens(input_ids)))
        for asked, change in self._changes:
            scores = asked.on(scores, change)
        return scores if self._drawn is None else self._drawn.on(scores, self._draw)

    def _tokens(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The tokens so far, with each row's padding replaced by its newest token, which counts anyway."""
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        return torch.where(places < self._padding, input_ids[:, -1:], input_ids)

    def _draw(self, scores: torch.Tensor, asked: _Asked) -> torch.Tensor:
        # In float32 the sum would lose tokens of a large vocabulary whose probability is below 1e-7.
        sums = scores.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
        chosen = torch.searchsorted(sums, self._draws.next() * sums[:, -1:], right=True)
        return scores.scatter_(1, chosen.clamp_(max=scores.shape[-1] - 1), torch.inf)


def _penalty(sampling: SamplingParams) -> float | None:
    return None if sampling.repetition_penalty == 1.0 else sampling.repetition_penalty


def _temperature(sampling: SamplingParams) -> float | None:
    return None if sampling.temperature == 1.0 else sampling.temperature


def _top_k(sampling: SamplingParams) -> int | None:
    return sampling.top_k if sampling.top_k is not None and sampling.top_k > 0 else None


def _top_p(sampling: SamplingParams) -> float | None:
    return sampling.top_p if sampling.top_p is not None and sampling.top_p < 1.0 else None


def _min_p(sampling: SamplingParams) -> float | None:
    return sampling.min_p or None


def _penalise(scores: torch.Tensor, asked: _Asked, *, tokens: torch.Tensor) -> torch.Tensor:
    tokens = asked.of(tokens)
    score = scores.gather(1, tokens)
    score = torch.where(score < 0, score * asked.values, score / asked.values)
    return scores.scatter(1, tokens, score)


def _divide(scores: torch.Tensor, asked: _Asked) -> torch.Tensor:
    return scores / asked.values


def _keep_top_k(scores: torch.Tensor, asked: _Asked) -> torch.Tensor:
    vocabulary = scores.shape[-1]
    largest = torch.topk(scores, min(int(asked.largest), vocabulary)).values
    smallest_kept = largest.gather(1, asked.values.clamp(max=vocabulary) - 1)
    return scores.masked_fill(scores < smallest_kept, -torch.inf)


def _keep_top_p(scores: torch.Tensor, asked: _Asked, *, tokens: int = NUCLEUS_TOKENS) -> torch.Tensor:
    """Keeps the likeliest tokens, up to the one whose probability takes their sum to top_p."""
    vocabulary = scores.shape[-1]
    largest, order = scores.softmax(dim=-1).topk(min(tokens, vocabulary))
    sums = largest.cumsum(dim=-1)
    beyond = sums - largest >= asked.values
    beyond[:, 0] = False
    removed = torch.ones_like(scores, dtype=torch.bool).scatter_(1, order, beyond)
    kept = scores.masked_fill(removed, -torch.inf)
    if tokens < vocabulary:
        wider = (sums[:, -1] < asked.values[:, 0]).nonzero()[:, 0]
        if len(wider):
            rest = asked._replace(values=asked.values[wider])
            kept[wider] = _keep_top_p(scores[wider], rest, tokens=vocabulary)
    return kept


def _keep_min_p(scores: torch.Tensor, asked: _Asked) -> torch.Tensor:
    # A probability is below min_p times the largest one where its logit is this far below the largest.
    return scores.masked_fill(scores < scores.amax(dim=-1, keepdim=True) + asked.values.log(), -torch.inf)


_OPTIONS: tuple[tuple[Callable[[SamplingParams], float | None], _Change], ...] = (
    (_temperature, _divide),
    (_top_k, _keep_top_k),
    (_top_p, _keep_top_p),
    (_min_p, _keep_min_p),
)
