"""Repetition, presence and frequency penalties: the tokens that a sequence has read and written change its logits.

Owns, on the device, the tokens of each sequence that asks, with the number of times that it generated them: a list of
tokens, and not a count for every token of the vocabulary, since a step reads and writes a few thousand logits of a row,
of hundreds of thousands. Room for the lists is taken when a sequence first asks, and given back when none does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from batchmill.jobs.requests.generation import SamplingParams
from batchmill.worker.devices.upload import upload

#: A list has places for at least this many tokens.
LEAST_PLACES = 256

_Places = npt.NDArray[np.intp]


def asks_for_penalties(sampling: SamplingParams) -> bool:
    return _factors(sampling) != (1.0, 0.0, 0.0)


def _factors(sampling: SamplingParams) -> tuple[float, float, float]:
    repetition = 1.0 if sampling.repetition_penalty is None else sampling.repetition_penalty
    return repetition, sampling.presence_penalty or 0.0, sampling.frequency_penalty or 0.0


class Penalties:
    """The penalties of the sequences on some of the batch slots; only batch slots that ask are ever named to it."""

    def __init__(self, *, batch_slots: int, device: torch.device) -> None:
        self._device = device
        self._held: set[int] = set()
        #: Repetition, presence and frequency of each batch slot.
        self._factors = np.zeros((batch_slots, 3), dtype=np.float32)
        #: Places of each batch slot's list that hold a token; a token stands in several when it was generated
        #: repeatedly.
        self._lengths = np.zeros(batch_slots, dtype=np.int64)
        #: (batch_slots, places) each. Every place of a token has the same count: the times that it was generated.
        self._tokens = torch.empty(batch_slots, 0, dtype=torch.int32, device=device)
        self._counts = torch.empty(batch_slots, 0, dtype=torch.float32, device=device)

    def enter(self, batch_slot: int, sampling: SamplingParams, prompt: Sequence[int], generated: Sequence[int]) -> None:
        """Gives the batch slot to a sequence that asks."""
        self._held.add(batch_slot)
        self._factors[batch_slot] = _factors(sampling)
        # The prompt counts for the repetition penalty alone.
        read = dict.fromkeys(prompt, 0) if self._factors[batch_slot, 0] != 1.0 else {}
        counts = {**read, **Counter(generated)}
        self._lengths[batch_slot] = len(counts)
        self._make_room(len(counts) + 1)
        tokens = np.fromiter(counts.keys(), dtype=np.int32, count=len(counts))
        self._tokens[batch_slot, : len(counts)] = upload(tokens, self._device)
        self._counts[batch_slot, : len(counts)] = upload(
            np.array(list(counts.values()), dtype=np.float32), self._device
        )

    def leave(self, batch_slot: int) -> None:
        """Frees the batch slot of a sequence that asked and is gone, or found no room."""
        self._held.discard(batch_slot)
        if not self._held:
            self._tokens, self._counts = self._tokens[:, :0].clone(), self._counts[:, :0].clone()

    def apply(self, scores: torch.Tensor, rows: _Places, batch_slots: _Places) -> None:
        """Penalizes in place `rows` of the contiguous scores (all rows, vocabulary), one for each batch slot.

        As in transformers: the repetition penalty divides positive logits of prompt and answer, and multiplies
        negative ones. As in OpenAI's API and vLLM: frequency is subtracted for each time that a token was generated,
        presence once.
        """
        places = self._places(batch_slots)
        first = upload(rows[:, None] * scores.shape[1], self._device)
        logits = self._tokens.view(-1)[places] + first
        score = scores.view(-1)[logits]
        # An empty list stands for a place that means nothing, whose logit is left as it is.
        known = np.where(self._lengths[batch_slots, None] > 0, self._factors[batch_slots], (1.0, 0.0, 0.0)).astype(
            np.float32
        )
        repetition, presence, frequency = upload(known, self._device)[..., None].unbind(1)
        # One of the two is 0, and -inf stays -inf.
        score = score.clamp(min=0.0) / repetition + score.clamp(max=0.0) * repetition
        counts = self._counts.view(-1)[places]
        score -= frequency * counts + presence * counts.clamp(max=1.0)
        # Places of the same token write the same score.
        scores.view(-1)[logits] = score

    def record(self, batch_slots: _Places, tokens: torch.Tensor) -> None:
        """Notes that the sequences on `batch_slots` have generated these tokens, (len(batch_slots),)."""
        lengths = self._lengths[batch_slots]
        self._make_room(int(lengths.max()) + 1)
        places = self._places(batch_slots)
        same = self._tokens.view(-1)[places] == tokens[:, None]
        same &= upload(lengths[:, None] > 0, self._device)
        counts = self._counts.view(-1)[places] + same
        self._counts.view(-1)[places] = counts
        added = upload(batch_slots * self._counts.shape[1] + lengths, self._device)
        self._tokens.view(-1)[added] = tokens.int()
        self._counts.view(-1)[added] = (counts * same).amax(dim=1).clamp(min=1.0)
        self._lengths[batch_slots] += 1

    def _places(self, batch_slots: _Places) -> torch.Tensor:
        """Flat indices of the lists of these batch slots, (len(batch_slots), longest); short ones repeat their last."""
        last = np.maximum(self._lengths[batch_slots] - 1, 0)
        columns = torch.arange(int(last.max()) + 1, device=self._device)
        first = upload(batch_slots[:, None] * self._tokens.shape[1], self._device)
        return torch.minimum(columns, upload(last[:, None], self._device)) + first

    def _make_room(self, length: int) -> None:
        """Makes room for lists of this length, at least doubled when it grows."""
        room = self._tokens.shape[1]
        if length > room:
            more = max(length, 2 * room, LEAST_PLACES) - room
            self._tokens = torch.nn.functional.pad(self._tokens, (0, more))
            self._counts = torch.nn.functional.pad(self._counts, (0, more))
