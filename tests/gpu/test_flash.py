"""The kernel over pages on a GPU gives what plain attention gives: long rows beside short ones, in all steps."""

from __future__ import annotations

import pytest
import torch

from tests.unit.worker.engine.continuous.attention.test_flash import KV_HEADS, ROWS, STEPS, Steps


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("window", [None, 7, 600])
@pytest.mark.parametrize("heads", [KV_HEADS, 4 * KV_HEADS])
@pytest.mark.parametrize("size", [64, 128])
def test_pages_are_read_as_slots_are(size: int, heads: int, window: int | None, fixed: bool) -> None:
    torch.manual_seed(0)
    both = Steps(
        heads=heads, window=window, fixed=fixed, size=size, dtype=torch.bfloat16, device=torch.device("cuda:0")
    )
    for spans, rows, more in zip(STEPS, ROWS, (0, 3, 0), strict=True):
        both.compare(spans, rows, more=more)
