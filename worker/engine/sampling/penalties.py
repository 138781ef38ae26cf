"""Repetition, presence and frequency penalties: what a sequence has read and written changes its logits.

Owns, on the device, which tokens each asking sequence has had and how often it generated them, as a list of tokens
and not as a count for every token of the vocabulary: a step reads and writes a few thousand logits of a row, of
hundreds of thousands. Room for the lists is taken when a sequence first asks, and given back when none does.
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
    """The penalties of the sequences on some of the seats; only seats that ask are ever named to it."""

    def __init__(self, *, seats: int, device: torch.device) -> None:
        self._device = device
        self._held: set[int] = set()
        #: Repetition, presence and frequency of each seat.
        self._factors = np.zeros((seats, 3), dtype=np.float32)
        #: Places of each seat's list that hold a token; a token stands in several when it was generated repeatedly.
        self._lengths = np.zeros(seats, dtype=np.int64)
        #: (seats, places) each. Every place of a token has the same count: how often it was generated.
        self._tokens = torch.empty(seats, 0, dtype=torch.int32, device=device)
        self._counts = torch.empty(seats, 0, dtype=torch.float32, device=device)

    def enter(self, seat: int, sampling: SamplingParams, prompt: Sequence[int], generated: Sequence[int]) -> None:
        """A sequence that asks takes the seat."""
        self._held.add(seat)
        self._factors[seat] = _factors(sampling)
        # The prompt counts for the repetition penalty alone.
        read = dict.fromkeys(prompt, 0) if self._factors[seat, 0] != 1.0 else {}
        counts = {**read, **Counter(generated)}
        self._lengths[seat] = len(counts)
        self._make_room(len(counts) + 1)
        tokens = np.fromiter(counts.keys(), dtype=np.int32, count=len(counts))
        self._tokens[seat, : len(counts)] = upload(tokens, self._device)
        self._counts[seat, : len(counts)] = upload(np.array(list(counts.values()), dtype=np.float32), self._device)

    def leave(self, seat: int) -> None:
        """The sequence that asked is gone, or found no room."""
        self._held.discard(seat)
        if not self._held:
            self._tokens, self._counts = self._tokens[:, :0].clone(), self._counts[:, :0].clone()

    def apply(self, scores: torch.Tensor, rows: _Places, seats: _Places) -> None:
        """Changes in place these rows of the scores (all rows, vocabulary), contiguous, of the sequences on `seats`.

        As in transformers: the repetition penalty divides positive logits of prompt and answer, and multiplies
        negative ones. As in OpenAI's API and vLLM: frequency is subtracted for each time that a token was generated,
        presence once.
        """
        places = self._places(seats)
        first = upload(rows[:, None] * scores.shape[1], self._device)
        logits = self._tokens.view(-1)[places] + first
        score = scores.view(-1)[logits]
        # What no token was read or written for stands on a place that means nothing, and is left as it is.
        known = np.where(self._lengths[seats, None] > 0, self._factors[seats], (1.0, 0.0, 0.0)).astype(np.float32)
        repetition, presence, frequency = upload(known, self._device)[..., None].unbind(1)
        # One of the two is 0, and -inf stays -inf.
        score = score.clamp(min=0.0) / repetition + score.clamp(max=0.0) * repetition
        counts = self._counts.view(-1)[places]
        score -= frequency * counts + presence * counts.clamp(max=1.0)
        # Places of the same token write the same score.
        scores.view(-1)[logits] = score

    def record(self, seats: _Places, tokens: torch.Tensor) -> None:
        """The sequences on `seats` have generated these tokens, (len(seats),)."""
        lengths = self._lengths[seats]
        self._make_room(int(lengths.max()) + 1)
        places = self._places(seats)
        same = self._tokens.view(-1)[places] == tokens[:, None]
        same &= upload(lengths[:, None] > 0, self._device)
        counts = self._counts.view(-1)[places] + same
        self._counts.view(-1)[places] = counts
        added = upload(seats * self._counts.shape[1] + lengths, self._device)
        self._tokens.view(-1)[added] = tokens.int()
        self._counts.view(-1)[added] = (counts * same).amax(dim=1).clamp(min=1.0)
        self._lengths[seats] += 1

    def _places(self, seats: _Places) -> torch.Tensor:
        """Where the lists of these seats lie, (len(seats), longest) as flat indices; short ones repeat their last."""
        last = np.maximum(self._lengths[seats] - 1, 0)
        columns = torch.arange(int(last.max()) + 1, device=self._device)
        first = upload(seats[:, None] * self._tokens.shape[1], self._device)
        return torch.minimum(columns, upload(last[:, None], self._device)) + first

    def _make_room(self, length: int) -> None:
        """Room for lists of this length, at least doubled when it grows."""
        room = self._tokens.shape[1]
        if length > room:
            more = max(length, 2 * room, LEAST_PLACES) - room
            self._tokens = torch.nn.functional.pad(self._tokens, (0, more))
            self._counts = torch.nn.functional.pad(self._counts, (0, more))
