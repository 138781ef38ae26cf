"""The next token of every sequence that holds a batch slot, each by its own sampling parameters, all in one call.

Owns the options of each sequence, the number of tokens that it has generated, and the order of the options: logprobs
are taken, then logit_bias, min_tokens, the penalties, a grammar's mask, temperature, top_k, top_p, min_p, and the draw.
The options themselves are in `biases`, `penalties`, `bitmask`, `nucleus` and `draws`; their meaning is that of
transformers (`generation/logits_process.py`), and of OpenAI's API for the presence and frequency penalties. It knows
no text, no request and no stopping.

Each option works on the rows that ask for it and on no others, so all of them mix freely, and one that no row asks
for costs nothing. A row's token depends on its own logits and sequence alone, bit for bit on a CPU: no row's
arithmetic depends on the others. No call waits for the device.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt
import torch

from batchmill.jobs.requests.generation import SamplingParams
from batchmill.worker.devices.upload import upload
from batchmill.worker.engine.sampling import draws, nucleus
from batchmill.worker.engine.sampling.biases import Biases, asks_for_biases
from batchmill.worker.engine.sampling.bitmask import Bitmask
from batchmill.worker.engine.sampling.logprobs import Logprobs, RawLogprobs
from batchmill.worker.engine.sampling.penalties import Penalties, asks_for_penalties

#: Temperatures below this are greedy: dividing by one of them leaves nothing but the largest logit.
GREEDY_BELOW = 1e-5
#: Logits that are worked on at once, so that the memory for it does not grow with the rows: on a CPU, 4 MiB that
#: its caches hold; on a GPU, enough of them that starting its kernels does not count.
LOGITS_AT_ONCE_ON_CPU, LOGITS_AT_ONCE = 2**20, 2**22

_Places = npt.NDArray[np.intp]


class _Ask(IntEnum):
    """The work that a sequence may ask for besides its largest logit."""

    BIASES = 0
    PENALTIES = 1
    DRAW = 2
    LOGPROBS = 3


@dataclass(frozen=True, slots=True)
class Sampled:
    """The result of one call."""

    #: (rows,) int64, on the device.
    tokens: torch.Tensor
    #: (rows,) of bool, on the device: the row's logits are numbers. The token of another row, with a NaN or +inf or
    #: nothing finite, means nothing.
    sound: torch.Tensor
    #: The logprobs of the rows that ask, None if none does.
    logprobs: Logprobs | None


class Sampler:
    """The state of at most `batch_slots` sequences, and their next tokens.

    Batch slots are numbered from 0. Sequences come and go with `enter` and `leave`; `sample` takes any that are there,
    in any order.
    """

    def __init__(self, *, batch_slots: int, vocabulary: int, device: torch.device) -> None:
        self._device, self._vocabulary = device, vocabulary
        at_once = LOGITS_AT_ONCE_ON_CPU if device.type == "cpu" else LOGITS_AT_ONCE
        self._rows_at_once = max(1, at_once // vocabulary)
        self._asking: set[int] = set()
        self._asks = np.zeros((len(_Ask), batch_slots), dtype=np.bool_)
        self._generated = np.zeros(batch_slots, dtype=np.int64)
        self._temperatures = np.ones(batch_slots, dtype=np.float32)
        self._limits = nucleus.Limits(
            np.zeros(batch_slots, dtype=np.int64), np.ones(batch_slots), np.zeros(batch_slots)
        )
        self._keys = np.zeros(batch_slots, dtype=np.uint64)
        self._alternatives = np.zeros(batch_slots, dtype=np.int64)
        self._biases = Biases(vocabulary=vocabulary, device=device)
        self._penalties = Penalties(batch_slots=batch_slots, device=device)
        self._bitmask = Bitmask(device)

    @property
    def greedy(self) -> bool:
        """True where all sequences ask for their largest logits and nothing else."""
        return not self._asking

    @torch.inference_mode()
    def enter(
        self,
        batch_slot: int,
        sampling: SamplingParams,
        *,
        prompt: Sequence[int],
        generated: Sequence[int] = (),
        end_token_ids: Collection[int] = (),
        choice: int = 0,
    ) -> None:
        """Gives a free batch slot to a sequence.

        A sequence that was preempted comes back with the tokens that it has generated, and goes on as if it had stayed;
        only without a seed does it draw other numbers. All tokens of prompt, answer and logit_bias are of the
        vocabulary.

        `end_token_ids`: the tokens that min_tokens holds back, beside the stop_token_ids.
        `choice`: its place among its request's n choices, each of which draws numbers of its own.
        """
        self._generated[batch_slot] = len(generated)
        biased, penalised = asks_for_biases(sampling), asks_for_penalties(sampling)
        drawn = (sampling.temperature or 0.0) >= GREEDY_BELOW
        self._asks[:, batch_slot] = asks = (biased, penalised, drawn, bool(sampling.logprobs))
        if any(asks):
            self._asking.add(batch_slot)
        if biased:
            self._biases.enter(batch_slot, sampling, end_token_ids)
        if penalised:
            self._penalties.enter(batch_slot, sampling, prompt, generated)
        if drawn:
            self._set_draw(batch_slot, sampling)
            self._keys[batch_slot] = draws.key(sampling.seed, choice)
        self._alternatives[batch_slot] = sampling.top_logprobs or 0

    def _set_draw(self, batch_slot: int, sampling: SamplingParams) -> None:
        top_k = sampling.top_k or 0
        self._temperatures[batch_slot] = sampling.temperature
        self._limits.top_k[batch_slot] = top_k if 0 < top_k < self._vocabulary else 0
        self._limits.top_p[batch_slot] = 1.0 if sampling.top_p is None else sampling.top_p
        self._limits.min_p[batch_slot] = sampling.min_p or 0.0

    @torch.inference_mode()
    def leave(self, batch_slot: int) -> None:
        """Frees the batch slot; nothing of its sequence stays."""
        if self._asks[_Ask.BIASES, batch_slot]:
            self._biases.leave(batch_slot)
        if self._asks[_Ask.PENALTIES, batch_slot]:
            self._penalties.leave(batch_slot)
        self._asks[:, batch_slot] = False
        self._asking.discard(batch_slot)

    @torch.inference_mode()
    def sample(
        self, batch_slots: Sequence[int], logits: torch.Tensor, *, allowed: torch.Tensor | None = None
    ) -> Sampled:
        """Samples the next tokens of different batch slots from logits, (len(batch_slots), vocabulary).

        Logits of float32 may be changed in place. `allowed`: a grammar's packed bitmask, (len(batch_slots),
        ceil(vocabulary / 32)) int32, the lowest bit the first token; rows without a grammar have all bits set. A row
        whose tokens are all forbidden takes one of them.
        """
        tokens = _largest(logits)
        sound = _sound(logits, tokens)
        if self.greedy and allowed is None:
            return Sampled(tokens, sound, None)
        held = np.asarray(batch_slots, dtype=np.intp)
        biased, penalised, drawn, with_logprobs = (np.flatnonzero(each) for each in self._asks[:, held])
        scores = logits.float().contiguous()
        raw = RawLogprobs(scores, upload(with_logprobs, self._device)) if len(with_logprobs) else None
        if len(biased):
            self._biases.add(scores, biased, held[biased], self._generated[held[biased]])
        if len(penalised):
            self._penalties.apply(scores, penalised, held[penalised])
        if allowed is not None:
            self._bitmask.apply(scores, allowed, rows_at_once=self._rows_at_once)
        if len(biased) or len(penalised) or allowed is not None:
            tokens = _largest(scores)
        for rows in np.split(drawn, range(self._rows_at_once, len(drawn), self._rows_at_once)):
            if len(rows):
                self._draw(scores, tokens, rows, held[rows])
        if len(penalised):
            self._penalties.record(held[penalised], tokens.index_select(0, upload(penalised, self._device)))
        self._generated[held] += 1
        if raw is None:
            return Sampled(tokens, sound, None)
        alternatives = int(self._alternatives[held[with_logprobs]].max())
        return Sampled(tokens, sound, raw.of(tokens, tuple(with_logprobs.tolist()), alternatives))

    def _draw(self, scores: torch.Tensor, tokens: torch.Tensor, rows: _Places, batch_slots: _Places) -> None:
        """Draws the tokens of these rows from `scores`, (all rows, vocabulary), into `tokens`, (all rows,)."""
        places = upload(rows, self._device)
        temperatures = upload(self._temperatures[batch_slots, None], self._device)
        probabilities = scores.index_select(0, places).div_(temperatures).softmax(dim=-1)
        nucleus.restrict(probabilities, self._limits.of(batch_slots))
        at = upload(draws.numbers(self._keys[batch_slots], self._generated[batch_slots])[:, None], self._device)
        tokens.index_copy_(0, places, draws.drawn(probabilities, at, otherwise=tokens.index_select(0, places)))


def _sound(logits: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """True for each row of numbers alone, (rows,): a NaN counts as the largest, so the largest tells of all."""
    return logits.gather(1, largest[:, None])[:, 0].isfinite()


def _largest(scores: torch.Tensor) -> torch.Tensor:
    """The first of the largest of each row, (rows,); a NaN is larger than any number."""
    if scores.device.type == "cpu":
        # Ten times as fast as torch's.
        return torch.from_numpy(scores.float().numpy().argmax(axis=1))
    return scores.argmax(dim=-1)
