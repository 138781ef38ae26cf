"""The options top_k, top_p and min_p, each as the smallest probability that it keeps.

Owns the search for that probability; equal probabilities are kept or excluded together. Nothing waits for the device:
a GPU sorts whole rows, and so does a CPU where the vocabulary is small. Elsewhere a CPU sorts, row by row, only the
tokens that can matter, a hundredth of a trained model's vocabulary. It knows no logits and no sequences.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from batchmill.worker.devices.upload import upload

#: The largest vocabulary of which a CPU sorts whole rows: it takes less time than one call of numpy for each row.
SORTED_VOCABULARY = 2_048


class Limits(NamedTuple):
    """The options of all rows, (rows,) each; 0, 1.0 and 0.0 exclude nothing, and top_k is below the vocabulary."""

    top_k: npt.NDArray[np.int64]
    top_p: npt.NDArray[np.float64]
    min_p: npt.NDArray[np.float64]

    def of(self, rows: slice | npt.NDArray[Any]) -> Limits:
        return Limits(self.top_k[rows], self.top_p[rows], self.min_p[rows])


def restrict(probabilities: torch.Tensor, limits: Limits) -> None:
    """Sets to 0, in place, the probabilities (rows, vocabulary), of float32, that the rows' limits exclude.

    In the order of transformers: top_k, then top_p of the rest, up to the token that takes the sum to it, then min_p of
    the largest. Each row keeps its likeliest token.
    """
    smallest: torch.Tensor | None = None
    ranked = np.flatnonzero((limits.top_k > 0) | (limits.top_p < 1.0))
    if len(ranked):
        smallest = _ranked(probabilities, limits, ranked)
    if limits.min_p.any():
        shares = upload(limits.min_p.astype(np.float32), probabilities.device)[:, None]
        floor = probabilities.amax(dim=1, keepdim=True) * shares
        smallest = floor if smallest is None else torch.maximum(smallest, floor)
    if smallest is not None:
        # Ones and zeros of float32: on a CPU, masks of bool take ten times as long.
        probabilities.mul_(torch.ge(probabilities, smallest, out=torch.empty_like(probabilities)))


def _ranked(probabilities: torch.Tensor, limits: Limits, rows: npt.NDArray[np.intp]) -> torch.Tensor:
    """The smallest probabilities that top_k and top_p keep, (all rows, 1); 0 but for these rows."""
    count, vocabulary = probabilities.shape
    device = probabilities.device
    row_limits = limits.of(rows)
    if device.type == "cpu" and vocabulary > SORTED_VOCABULARY:
        smallest = np.zeros((count, 1), dtype=np.float32)
        all_rows = probabilities.numpy()
        for row, top_k, top_p in zip(rows, row_limits.top_k.tolist(), row_limits.top_p.tolist(), strict=True):
            smallest[row] = _of_row(all_rows[row], top_k, top_p)
        return torch.from_numpy(smallest)
    if len(rows) == count:
        return _of_sorted(_descending(probabilities), row_limits)
    places = upload(rows, device)
    thresholds = _of_sorted(_descending(probabilities.index_select(0, places)), row_limits)
    return torch.zeros(count, 1, device=device).index_copy_(0, places, thresholds)


def _descending(probabilities: torch.Tensor) -> torch.Tensor:
    if probabilities.device.type == "cpu":
        # Ten times as fast as torch's.
        return torch.from_numpy(np.sort(probabilities.numpy(), axis=1)).flip(1)
    return probabilities.sort(dim=1, descending=True).values


def _of_sorted(descending: torch.Tensor, limits: Limits) -> torch.Tensor:
    """The smallest probability that each row keeps of its sorted ones, (rows, 1)."""
    vocabulary = descending.shape[1]
    kept = upload(np.where(limits.top_k > 0, limits.top_k, vocabulary)[:, None], descending.device)
    among = descending * (torch.arange(vocabulary, device=descending.device) < kept)
    sums = among.cumsum(dim=1, dtype=torch.float64)
    reached = torch.searchsorted(sums, upload(limits.top_p[:, None], descending.device) * sums[:, -1:])
    return descending.gather(1, torch.minimum(reached, kept - 1))


def _of_row(row: npt.NDArray[np.float32], top_k: int, top_p: float) -> float:
    """The smallest probability that one row, (vocabulary,), keeps."""
    if top_k:
        candidates = np.partition(row, len(row) - top_k)[-top_k:]
        if top_p >= 1.0:
            return float(candidates[0])
    else:
        # All that is smaller has at most half of the sum that top_p leaves out.
        candidates = row[row >= (1.0 - top_p) / (2 * len(row))]
        if not len(candidates):
            return 0.0  # a row of NaN
    candidates.sort()
    descending = candidates[::-1]
    sums = descending.cumsum(dtype=np.float64)
    whole = float(sums[-1]) if top_k else 1.0
    reached = int(sums.searchsorted(top_p * whole))
    return float(descending[min(reached, len(sums) - 1)])
