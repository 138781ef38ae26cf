"""Random draws: the numbers of a sequence, and the token where the sum of the probabilities passes such a number.

A number is a hash (SplitMix64) of seed, choice and position, computed on the host, and of nothing else: it stays the
same on every device, whatever runs beside the sequence, and after a preemption. A generator would have to be carried
along, and noise for every token of the vocabulary, as torch.multinomial draws it, takes four times as long on a CPU.
It knows no options: a token that they exclude has the probability 0 when it comes here.
"""

from __future__ import annotations

import secrets
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

#: Seeds are taken modulo this.
SEEDS = 2**64
#: Of SplitMix64 (Steele, Lea and Flood, Fast splittable pseudorandom number generators, 2014).
GOLDEN_GAMMA = 0x9E3779B97F4A7C15
MIXERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
#: Probabilities are summed by blocks of this many tokens; only the block where the sum passes the number is looked
#: into. The sums of a whole vocabulary, in float64, take 20 times as long.
BLOCK_TOKENS = 512


def key(seed: int | None, choice: int) -> int:
    """The key of one sequence's numbers, below SEEDS; a random one without a seed."""
    if seed is None:
        return secrets.randbits(64)
    state = _mixed(np.array([seed % SEEDS], dtype=np.uint64) + np.uint64(GOLDEN_GAMMA))
    return int(_mixed(state + np.uint64((choice + 1) * GOLDEN_GAMMA % SEEDS))[0])


def numbers(keys: npt.NDArray[np.uint64], positions: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """One number in [0, 1) for each key at its position, all (rows,)."""
    states = keys + (positions.astype(np.uint64) + np.uint64(1)) * np.uint64(GOLDEN_GAMMA)
    return (_mixed(states) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def drawn(probabilities: torch.Tensor, at: torch.Tensor, *, otherwise: torch.Tensor) -> torch.Tensor:
    """The tokens where the sums of the probabilities (rows, vocabulary), of float32, pass the numbers `at` (rows, 1).

    Probabilities need not sum to 1, and a token of probability 0 is never drawn. A row without any, or with a NaN,
    takes its token of `otherwise`, (rows,) like what is returned. A row's token does not depend on the other rows.
    """
    first: torch.Tensor | int = 0
    if probabilities.shape[1] > BLOCK_TOKENS:
        first, probabilities, at = _block(probabilities, at)
    sums = probabilities.cumsum(dim=1, dtype=torch.float64)
    token = first + _passing(sums, at * sums[:, -1:])
    return torch.where(sums[:, -1] > 0, token[:, 0], otherwise)


def _block(probabilities: torch.Tensor, at: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The block of each row where its sum passes the number: its first token, its probabilities, the number in it."""
    vocabulary = probabilities.shape[1]
    sums = _block_sums(probabilities).cumsum(dim=1, dtype=torch.float64)
    target = at * sums[:, -1:]
    block = _passing(sums, target)
    before = torch.nn.functional.pad(sums, (1, 0)).gather(1, block)
    share = (target - before) / (sums.gather(1, block) - before)

    first = block * BLOCK_TOKENS
    places = first + torch.arange(BLOCK_TOKENS, device=first.device)
    inside = probabilities.gather(1, places.clamp(max=vocabulary - 1)) * (places < vocabulary)
    return first, inside, share


def _block_sums(probabilities: torch.Tensor) -> torch.Tensor:
    """The sums of each row's blocks, of which the last may be shorter."""
    # A GPU's order of adding depends on how many rows there are: float64 makes that too small to matter.
    dtype = torch.float32 if probabilities.device.type == "cpu" else torch.float64
    vocabulary = probabilities.shape[1]
    whole = vocabulary - vocabulary % BLOCK_TOKENS
    sums = probabilities[:, :whole].view(-1, whole // BLOCK_TOKENS, BLOCK_TOKENS).sum(dim=2, dtype=dtype)
    if whole == vocabulary:
        return sums
    return torch.cat([sums, probabilities[:, whole:].sum(dim=1, keepdim=True, dtype=dtype)], dim=1)


def _passing(sums: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The first place whose sum is above the target, (rows, 1); where rounding leaves none, the last that adds."""
    place = torch.searchsorted(sums, target, right=True)
    last = torch.searchsorted(sums, sums[:, -1:].contiguous())
    return torch.minimum(place, last).clamp(max=sums.shape[1] - 1)


def _mixed(states: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
    states = (states ^ (states >> np.uint64(30))) * np.uint64(MIXERS[0])
    states = (states ^ (states >> np.uint64(27))) * np.uint64(MIXERS[1])
    mixed: npt.NDArray[np.uint64] = states ^ (states >> np.uint64(31))
    return mixed
