"""Attention over pages: the calls of the kernel for each step, answered here by the kernel's definition."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from batchmill.worker.engine.continuous.attention import flash
from batchmill.worker.engine.continuous.attention.cache import Cache, CacheShape
from batchmill.worker.engine.continuous.attention.flash import HEAD_MULTIPLE, LARGEST_HEAD, PAGE_TOKENS, FlashAttention
from batchmill.worker.engine.continuous.attention.sdpa import SdpaAttention
from batchmill.worker.engine.continuous.scheduling.slots import Slots
from batchmill.worker.engine.continuous.scheduling.step import Piece, Row

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
KV_HEADS = 2
#: The positions of each row in each step: prompts, then one token each, then one token each beside a chunk.
STEPS = [[(0, 300), (0, 5), (0, 256), (0, 700)], [(300, 301), (5, 6), (256, 257)], [(301, 302), (6, 7), (700, 709)]]
ROWS = [[0, 1, 2, 3], [0, 1, 2], [0, 1, 3]]


def kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: torch.Tensor,
    block_table: torch.Tensor,
    num_splits: int | None,
) -> torch.Tensor:
    """`varlen_attn` over pages, by its documentation; it refuses what torch 2.13's refuses, or gets wrong."""
    shared = query.shape[1] // key.shape[2]
    check_contract(query, key, value, cu_seq_q, cu_seq_k, seqused_k, block_table)
    assert enable_gqa == (shared > 1)
    assert max_q == int(cu_seq_q.diff().max())
    packed = max_q == 1 and shared > 1 and window_size == (-1, -1)
    assert packed or num_splits == 1, "split keys of packed rows go wrong"
    found = torch.empty_like(query)
    for row, used in enumerate(seqused_k.tolist()):
        begin, end = cu_seq_q[row : row + 2].tolist()
        assert end - begin <= max_q
        assert used <= max_k
        pages = block_table[row, : -(-used // PAGE_TOKENS)].long()
        keys, values = (each[pages].flatten(0, 1)[:used].repeat_interleave(shared, 1).float() for each in (key, value))
        places, asks = torch.arange(used), torch.arange(used - (end - begin), used)[:, None]
        left, right = window_size
        seen = (places <= asks + right if right >= 0 else places >= 0) & (places >= asks - left if left >= 0 else True)
        scores = torch.einsum("qhd,khd->hqk", query[begin:end].float(), keys) * scale
        shares = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        found[begin:end] = torch.einsum("hqk,khd->qhd", shares, values).to(found.dtype)
    return found


def check_contract(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    seqused_k: torch.Tensor,
    block_table: torch.Tensor,
) -> None:
    """Refuses what the kernel takes for something else, or reads beyond."""
    rows, size = len(seqused_k), query.shape[-1]
    assert {each.dtype for each in (query, key, value)} <= {torch.float16, torch.bfloat16}
    assert query.dtype is key.dtype is value.dtype
    assert size % HEAD_MULTIPLE == 0
    assert size <= LARGEST_HEAD
    assert query.ndim == 3
    assert query.is_contiguous()
    assert key.shape == value.shape
    assert key.shape[1] % PAGE_TOKENS == 0
    assert key.shape[3] == size
    assert query.shape[1] % key.shape[2] == 0
    for each in (cu_seq_q, cu_seq_k, seqused_k, block_table):
        assert each.dtype is torch.int32
        assert each.device == query.device
        assert each.stride(-1) == 1
    assert cu_seq_q.shape == cu_seq_k.shape == (rows + 1,)
    assert cu_seq_q[0] == 0
    assert cu_seq_q[-1] == len(query)
    assert seqused_k.min() >= 1
    assert len(block_table) == rows
    for pages, used in zip(block_table.tolist(), seqused_k.tolist(), strict=True):
        assert min(pages) >= 0
        assert max(pages) < len(key)
        assert len(pages) * PAGE_TOKENS >= used


class Steps:
    """Both kinds of attention over rows of the same slots; the plain one is in float32. `size`: of a head."""

    def __init__(
        self,
        *,
        heads: int,
        window: int | None,
        fixed: bool,
        size: int = 8,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device = CPU,
    ) -> None:
        self._heads, self._window, self._size = heads, window, size
        self._to: dict[str, Any] = {"dtype": dtype, "device": device}
        slots = Slots(4096, longest=1024, smallest=PAGE_TOKENS)
        self._unused = slots.tokens
        tokens = slots.tokens + PAGE_TOKENS
        exact, shape = (CacheShape(1, KV_HEADS, size, size, each) for each in (torch.float32, dtype))
        self._plain = SdpaAttention(Cache(exact, tokens, device, heads_first=True), fixed=fixed)
        self._flash = FlashAttention(
            Cache(shape, tokens, device, heads_first=False), rows=6, tokens=2048, longest=slots.longest, fixed=fixed
        )
        self._rows = [Row([0] * 709, 709) for _ in range(4)]
        for row, tokens in zip(self._rows, (302, 40, 300, 709), strict=True):
            row.slot = slots.take(tokens)

    def compare(self, spans: Sequence[tuple[int, int]], rows: Sequence[int], *, more: int) -> None:
        pieces = [Piece(self._rows[row], *span) for row, span in zip(rows, spans, strict=True)]
        tokens = sum(end - begin for begin, end in spans)
        query, key, value = (
            torch.randn(1, heads, tokens + more, self._size).to(**self._to)
            for heads in (self._heads, KV_HEADS, KV_HEADS)
        )
        module: Any = SimpleNamespace(layer_idx=0)
        found = []
        for attention, several, dtype in ((self._plain, 0, torch.float32), (self._flash, more, query.dtype)):
            attention.plan(pieces, unused=[self._unused] * several)
            q, k, v = (each[:, :, : tokens + several].to(dtype) for each in (query, key, value))
            answer, _ = attention(module, q, k, v, None, scaling=0.3, sliding_window=self._window)
            found.append(answer[:, :tokens].float())
        near = {} if query.dtype is torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
        torch.testing.assert_close(*found, **near)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Steps]:
    monkeypatch.setattr(flash, "varlen_attn", kernel)
    torch.manual_seed(0)
    return Steps


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("heads", [KV_HEADS, 3 * KV_HEADS])
def test_pages_are_read_as_slots_are(steps: Callable[..., Steps], heads: int, window: int | None, fixed: bool) -> None:
    both = steps(heads=heads, window=window, fixed=fixed)
    for spans, rows in zip(STEPS, ROWS, strict=True):
        both.compare(spans, rows, more=0)


def test_tokens_that_are_no_ones_change_nothing(steps: Callable[..., Steps]) -> None:
    both = steps(heads=2 * KV_HEADS, window=None, fixed=False)
    both.compare(STEPS[0], ROWS[0], more=0)
    both.compare(STEPS[1], ROWS[1], more=3)


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        (CacheShape(1, 2, 60, 60, torch.bfloat16), "multiples of 8 up to 256, and the model's are 60"),
        (CacheShape(1, 2, 512, 512, torch.bfloat16), "multiples of 8 up to 256, and the model's are 512"),
        (CacheShape(1, 2, 64, 32, torch.bfloat16), "of one size, and the model's of 64 and 32"),
        (CacheShape(1, 2, 64, 64, torch.float32), "in 16 bits, and the model in float32"),
        (CacheShape(1, 2, 64, 64, torch.float16, capped=True), "soft cap"),
    ],
)
def test_it_says_what_it_lacks_for_a_model(monkeypatch: pytest.MonkeyPatch, shape: CacheShape, said: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    assert flash.lacks(CacheShape(1, 2, 64, 64, torch.bfloat16), CUDA) is None
    assert said in str(flash.lacks(shape, CUDA))


def test_it_says_what_it_lacks_on_a_device_and_in_an_older_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    fine = CacheShape(1, 2, 64, 64, torch.bfloat16)
    assert "CUDA alone" in str(flash.lacks(fine, CPU))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (7, 5))
    assert "needs a CUDA capability of 8.0, and this device has 7.5" in str(flash.lacks(fine, CUDA))
    monkeypatch.setattr(flash, "varlen_attn", lambda query, key, value, *, scale, window_size: query)
    assert "without enable_gqa, seqused_k, block_table, num_splits" in str(flash.lacks(fine, CUDA))
    monkeypatch.setattr(flash, "varlen_attn", None)
    assert "without scale" in str(flash.lacks(fine, CUDA))
