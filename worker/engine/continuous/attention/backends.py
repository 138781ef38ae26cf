"""The backends of attention, the best first, and what each needs of a model and its device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from batchmill.worker.engine.continuous.attention import flash, sdpa
from batchmill.worker.engine.continuous.attention.cache import Cache, CacheShape
from batchmill.worker.engine.continuous.scheduling.step import Piece


class StepAttention(Protocol):
    """The attention of one step at a time: it is planned, and then called by every layer of the model's forward."""

    #: Seconds spent in it so far, by the CPU's clock.
    seconds: float

    def plan(self, pieces: Sequence[Piece[Any]], *, unused: Sequence[int] = ()) -> None:
        """Takes the pieces of a step, in the order of their tokens in the forward.

        `unused`: places of the cache for tokens that follow them and belong to no row.
        """

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        """Takes queries (1, heads, tokens, size), and keys and values of the same tokens, which it keeps.

        Returns (1, tokens, heads, size of a value), as transformers' attention functions do.
        """


@dataclass(frozen=True, slots=True)
class StepBounds:
    """The most of one step."""

    #: Its rows.
    rows: int
    #: Its tokens.
    tokens: int
    #: Tokens of the longest row.
    longest: int


@dataclass(frozen=True, slots=True)
class AttentionBackend:
    """One way to compute attention over the KV cache."""

    name: str
    #: True where it reads the cache in pages of `flash.PAGE_TOKENS`, and so needs slots that begin at one.
    pages: bool
    #: True where its tensors stay where they are, so that a CUDA graph can be captured over it.
    graphs: bool
    #: Says what it lacks for a model of this shape on this device; None where it serves it.
    lacks: Callable[[CacheShape, torch.device], str | None]
    #: Makes its attention over a cache; the last argument tells whether a row's numbers depend on its own length alone.
    build: Callable[[Cache, StepBounds, bool], StepAttention]


def _flash(cache: Cache, bounds: StepBounds, fixed: bool) -> StepAttention:
    return flash.FlashAttention(cache, rows=bounds.rows, tokens=bounds.tokens, longest=bounds.longest, fixed=fixed)


def _sdpa(cache: Cache, _bounds: StepBounds, fixed: bool) -> StepAttention:
    return sdpa.SdpaAttention(cache, fixed=fixed)


BACKENDS = (
    AttentionBackend("flash", pages=True, graphs=True, lacks=flash.lacks, build=_flash),
    AttentionBackend("sdpa", pages=False, graphs=False, lacks=lambda _shape, _device: None, build=_sdpa),
)


def qualified(shape: CacheShape, device: torch.device) -> Iterator[AttentionBackend]:
    """The backends that serve a model of this shape on this device, the best first."""
    return (each for each in BACKENDS if each.lacks(shape, device) is None)
