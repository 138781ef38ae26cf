"""Biases of single logits: logit_bias, and -inf for the end tokens of an answer that is too short to end.

Owns these few tokens of each sequence that asks, on the host, and their places among a step's logits. It knows no
text: it is told which tokens end an answer.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from batchmill.jobs.requests.generation import SamplingParams
from batchmill.worker.devices.upload import upload

_Places = npt.NDArray[np.intp]


def asks_for_biases(sampling: SamplingParams) -> bool:
    return bool(sampling.logit_bias or sampling.min_tokens)


class _Bias(NamedTuple):
    """The biases of one sequence's tokens."""

    tokens: npt.NDArray[np.int64]
    #: Added before the sequence has generated min_tokens.
    early: npt.NDArray[np.float32]
    #: Added from then on.
    late: npt.NDArray[np.float32]
    min_tokens: int


class Biases:
    """The biases of the sequences on some of the batch slots; only batch slots that ask are ever named to it."""

    def __init__(self, *, vocabulary: int, device: torch.device) -> None:
        self._vocabulary, self._device = vocabulary, device
        self._by_batch_slot: dict[int, _Bias] = {}

    def enter(self, batch_slot: int, sampling: SamplingParams, end_token_ids: Collection[int]) -> None:
        """Gives the batch slot to a sequence that asks; the tokens of its logit_bias are of the vocabulary."""
        # A tokenizer may name end tokens that the model cannot write.
        ends = {each for each in (*end_token_ids, *(sampling.stop_token_ids or ())) if each < self._vocabulary}
        late = {**dict.fromkeys(ends, 0.0), **dict(sampling.logit_bias or ())}
        early = {**late, **dict.fromkeys(ends, -np.inf)}
        self._by_batch_slot[batch_slot] = _Bias(
            np.array(list(late), dtype=np.int64),
            np.array(list(early.values()), dtype=np.float32),
            np.array(list(late.values()), dtype=np.float32),
            sampling.min_tokens or 0,
        )

    def leave(self, batch_slot: int) -> None:
        """Frees the batch slot of a sequence that asked and is gone, or found no room."""
        self._by_batch_slot.pop(batch_slot, None)

    def add(self, scores: torch.Tensor, rows: _Places, batch_slots: _Places, generated: npt.NDArray[np.int64]) -> None:
        """Adds the biases in place to `rows` of the contiguous scores (all rows, vocabulary), one for each batch slot.

        `generated`: the number of tokens that each of them has generated.
        """
        logits: list[npt.NDArray[np.int64]] = []
        values: list[npt.NDArray[np.float32]] = []
        for row, batch_slot, count in zip(rows.tolist(), batch_slots.tolist(), generated.tolist(), strict=True):
            bias = self._by_batch_slot[batch_slot]
            logits.append(bias.tokens + row * scores.shape[1])
            values.append(bias.early if count < bias.min_tokens else bias.late)
        places = upload(np.concatenate(logits), self._device)
        scores.view(-1).index_add_(0, places, upload(np.concatenate(values), self._device))
