"""Attention over the cache on CUDA: one call a layer for all rows, through the FlashAttention that torch carries.

Owns the description of a step on the device, in tensors that stay where they are, so that a CUDA graph can be
captured over them.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from itertools import accumulate
from time import perf_counter
from typing import Any

import torch

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch before 2.10
    varlen_attn = None  # type: ignore[assignment]

from batchmill.worker.engine.continuous.attention.cache import Cache, CacheShape
from batchmill.worker.engine.continuous.scheduling.step import Piece

#: The kernel reads the cache in pages of a multiple of this many tokens, so slots begin at one.
PAGE_TOKENS = 256
#: The arguments of the kernel that are used here.
_ARGUMENTS = ("scale", "window_size", "enable_gqa", "seqused_k", "block_table", "num_splits")
#: The kernel's largest head size, the divisor of all of them, and the first CUDA capability that it runs on.
LARGEST_HEAD, HEAD_MULTIPLE, FIRST_CAPABILITY = 256, 8, (8, 0)


def lacks(shape: CacheShape, device: torch.device) -> str | None:
    """Says what the kernel lacks for a model of this shape on this device; None where it serves it."""
    if device.type != "cuda":
        return "it runs on CUDA alone"
    if missing := _missing_arguments():
        return f"torch {torch.__version__} has it without {', '.join(missing)}: torch 2.12 is the first that it needs"
    if (capability := torch.cuda.get_device_capability(device)) < FIRST_CAPABILITY:
        return f"it needs a CUDA capability of {_dotted(FIRST_CAPABILITY)}, and this device has {_dotted(capability)}"
    if shape.dtype not in (torch.float16, torch.bfloat16):
        return f"it computes in 16 bits, and the model in {str(shape.dtype).removeprefix('torch.')}"
    if shape.key_size != shape.value_size:
        return f"its keys and values are of one size, and the model's of {shape.key_size} and {shape.value_size}"
    if shape.key_size > LARGEST_HEAD or shape.key_size % HEAD_MULTIPLE:
        return f"its heads are multiples of {HEAD_MULTIPLE} up to {LARGEST_HEAD}, and the model's are {shape.key_size}"
    return "it knows no soft cap" if shape.capped else None


def _missing_arguments() -> list[str]:
    """Lists the arguments that torch's kernel does not take."""
    taken = inspect.signature(varlen_attn).parameters if varlen_attn is not None else ()
    return [each for each in _ARGUMENTS if each not in taken]


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


class FlashAttention:
    """The attention of one step at a time: `plan` it, then run the model's forward, in which every layer calls this.

    `rows`, `tokens`: the most of one step.
    `longest`: the tokens of the longest row.
    `fixed`: a row's numbers do not depend on its neighbours.
    """

    def __init__(self, cache: Cache, *, rows: int, tokens: int, longest: int, fixed: bool = False) -> None:
        device = cache.device
        self.seconds = 0.0
        self._cache = cache
        self._fixed = fixed
        self._places = torch.zeros(tokens, dtype=torch.long, device=device)
        self._starts = torch.zeros(rows + 1, dtype=torch.int32, device=device)
        self._lengths = torch.zeros(rows, dtype=torch.int32, device=device)
        self._pages = torch.zeros((rows, -(-longest // PAGE_TOKENS)), dtype=torch.int32, device=device)
        self._longest = longest
        self._rows = self._tokens = self._most_queries = 0

    def plan(self, pieces: Sequence[Piece[Any]], *, unused: Sequence[int] = ()) -> None:
        """Describes a step on the device, as `StepAttention.plan` is told of it."""
        places = [row.held.start + place for row, begin, end in pieces for place in range(begin, end)]
        counts = [end - begin for _, begin, end in pieces] + [1] * len(unused)
        starts = [row.held.start for row, _, _ in pieces] + [place - place % PAGE_TOKENS for place in unused]
        ends = [end for _, _, end in pieces] + [place % PAGE_TOKENS + 1 for place in unused]
        self._rows, self._tokens, self._most_queries = len(counts), sum(counts), max(counts)
        _write(self._places, [*places, *unused])
        _write(self._starts, [0, *accumulate(counts)])
        _write(self._lengths, ends)
        first = torch.tensor([start // PAGE_TOKENS for start in starts], dtype=torch.int32)
        used = torch.tensor([-(-end // PAGE_TOKENS) for end in ends], dtype=torch.int32)
        # Pages beyond a row's own are never read, and have to be pages all the same; those beyond the longest row's
        # stay what they were, since a long context has more of them than the host copies without waiting.
        pages = torch.arange(int(used.max()), dtype=torch.int32)
        numbers = first[:, None] + torch.minimum(pages, used[:, None] - 1)
        self._pages[: self._rows, : len(pages)].copy_(numbers, non_blocking=True)

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        scaling: float | None = None,
        sliding_window: int | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """Computes a layer in one call of the kernel; shapes as in `StepAttention`."""
        begin = perf_counter()
        layer: Any = module.layer_idx
        heads = self._cache.heads
        keys = self._cache.keys[layer].view(-1, heads, key.shape[-1])
        values = self._cache.values[layer].view(-1, heads, value.shape[-1])
        places = self._places[: self._tokens]
        keys.index_copy_(0, places, key[0].transpose(0, 1))
        values.index_copy_(0, places, value[0].transpose(0, 1))
        shared = query.shape[1] != key.shape[1]
        window, splits = self._how(sliding_window, shared=shared)
        starts = self._starts[: self._rows + 1]
        output = varlen_attn(
            query[0].transpose(0, 1).contiguous(),
            keys.view(-1, PAGE_TOKENS, heads, key.shape[-1]),
            values.view(-1, PAGE_TOKENS, heads, value.shape[-1]),
            starts,
            starts,  # required, and not read beside lengths and pages
            self._most_queries,
            self._longest,
            scale=scaling,
            window_size=window,
            enable_gqa=shared,
            seqused_k=self._lengths[: self._rows],
            block_table=self._pages[: self._rows],
            num_splits=splits,
        )
        assert isinstance(output, torch.Tensor), "no second result was asked for"
        self.seconds += perf_counter() - begin
        return output[None], None

    def _how(self, sliding_window: int | None, *, shared: bool) -> tuple[tuple[int, int], int | None]:
        """The window of a call, left and right of a query, and the number of parts that its keys are split into.

        A row's only query sees all of it without being told to be causal. Called so, the kernel reads keys once for all
        heads that share them, and splits long rows as it likes. Any other call over pages is wrong when it is split
        (pytorch issue 194167), so it is told not to.
        """
        if sliding_window is not None:
            return (sliding_window - 1, 0), 1
        if self._most_queries > 1:
            return (-1, 0), 1
        return (-1, -1), None if shared and not self._fixed else 1


def _write(target: torch.Tensor, values: Sequence[int]) -> None:
    """Writes the beginning of a tensor that stays where it is."""
    target[: len(values)].copy_(torch.tensor(values, dtype=target.dtype), non_blocking=True)
