"""Applies a grammar's packed bitmask: -inf for every token that it forbids. It knows no grammar."""

from __future__ import annotations

import torch


class Bitmask:
    """Applies masks of (rows, ceil(vocabulary / 32)) int32: the lowest bit is the first token, a set bit allows it."""

    def __init__(self, device: torch.device) -> None:
        bits = torch.arange(256)[:, None] >> torch.arange(8) & 1
        #: The values that each byte of a mask adds to its eight logits. On a CPU, looking bytes up takes a tenth of the
        #: time of shifting and masking.
        self._added = torch.zeros(256, 8).masked_fill_(bits == 0, -torch.inf).to(device)

    def apply(self, scores: torch.Tensor, allowed: torch.Tensor, *, rows_at_once: int) -> None:
        """Changes the scores (rows, vocabulary) in place; rows with all bits set stay as they are."""
        allowed = allowed.to(scores.device, non_blocking=True)
        if scores.device.type == "cpu":
            forbidding = (allowed != -1).any(dim=1).nonzero()[:, 0]
            for rows in torch.split(forbidding, rows_at_once):
                scores.index_add_(0, rows, self._change(allowed[rows], scores.shape[1]))
        else:
            # Asking which rows have a grammar would wait for the device.
            for part, mask in zip(torch.split(scores, rows_at_once), torch.split(allowed, rows_at_once), strict=True):
                part += self._change(mask, scores.shape[1])

    def _change(self, allowed: torch.Tensor, vocabulary: int) -> torch.Tensor:
        octets = allowed.contiguous().view(torch.uint8).int()
        return torch.nn.functional.embedding(octets, self._added).flatten(1)[:, :vocabulary]
