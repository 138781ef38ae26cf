"""The trial of attention backends: right ones pass it, and each fault is found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from batchmill.worker.engine.continuous.attention import flash
from batchmill.worker.engine.continuous.attention.backends import BACKENDS, StepBounds
from batchmill.worker.engine.continuous.attention.cache import Cache, CacheShape
from batchmill.worker.engine.continuous.attention.flash import PAGE_TOKENS
from batchmill.worker.engine.continuous.attention.trial import error_of
from batchmill.worker.engine.continuous.scheduling.slots import Slots
from tests.unit.worker.engine.continuous.attention.test_flash import kernel

CPU = torch.device("cpu")
FLASH, SDPA = BACKENDS
BOUNDS = StepBounds(4, 2_048, 1_024)
Change = Callable[[dict[str, Any]], dict[str, Any]]


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash, "varlen_attn", kernel)


def tried(
    name: str,
    shape: CacheShape,
    *,
    bounds: StepBounds = BOUNDS,
    fixed: bool = False,
    change: Change = dict,
) -> str | None:
    """The trial of a backend, of which each call is changed."""
    (backend,) = (each for each in BACKENDS if each.name == name)
    slots = Slots(4_096, longest=bounds.longest, smallest=PAGE_TOKENS)
    cache = Cache(shape, slots.tokens + PAGE_TOKENS, CPU, heads_first=not backend.pages)
    attention = backend.build(cache, bounds, fixed)
    free = slots.tokens

    class Changed:
        seconds = 0.0
        plan = staticmethod(attention.plan)

        def __call__(self, *arguments: Any, **options: Any) -> tuple[torch.Tensor, None]:
            return attention(*arguments, **change(options))

    said = error_of(Changed(), shape, slots, bounds, CPU)
    assert slots.tokens == free
    assert slots.take(bounds.longest) is not None
    return said


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("sdpa", CacheShape(2, 2, 8, 8, torch.float32, query_heads=6)),
        ("sdpa", CacheShape(2, 2, 8, 6, torch.float32, query_heads=2, windows=(4, 5_000))),
        ("sdpa", CacheShape(2, 2, 16, 16, torch.float32, capped=True, query_heads=4, windows=(100,))),
        ("sdpa", CacheShape(2, 2, 16, 16, torch.bfloat16, query_heads=4)),
        ("flash", CacheShape(2, 2, 16, 16, torch.bfloat16, query_heads=6)),
        ("flash", CacheShape(2, 2, 16, 16, torch.float16, query_heads=2, windows=(7, 300))),
    ],
)
def test_what_is_right_passes(name: str, shape: CacheShape, fixed: bool) -> None:
    assert tried(name, shape, fixed=fixed) is None


@pytest.mark.parametrize("bounds", [StepBounds(1, 64, 1_024), StepBounds(4, 16, 3), StepBounds(2, 8, 1)])
def test_small_engines_are_tried_too(bounds: StepBounds) -> None:
    assert tried("sdpa", CacheShape(1, 2, 8, 8, torch.float32, query_heads=4, windows=(2,)), bounds=bounds) is None


@pytest.mark.parametrize(
    ("shape", "change"),
    [
        (CacheShape(1, 2, 8, 8, torch.float32), lambda options: options | {"scaling": 1.1 * options["scaling"]}),
        (CacheShape(1, 2, 8, 8, torch.float32), lambda options: options | {"sliding_window": 500}),
        (
            CacheShape(1, 2, 8, 8, torch.float32, windows=(300,)),
            lambda options: options | {"sliding_window": options["sliding_window"] and options["sliding_window"] + 1},
        ),
        (
            CacheShape(1, 2, 8, 8, torch.float32, windows=(100_000,)),
            lambda options: options | {"sliding_window": None},
        ),
        (CacheShape(1, 2, 8, 8, torch.float32, capped=True), lambda options: options | {"softcap": None}),
    ],
    ids=["scaling", "a window of its own", "one more", "no window", "no soft cap"],
)
def test_each_fault_is_found(shape: CacheShape, change: Change) -> None:
    assert "its results are wrong by" in str(tried("sdpa", shape, change=change))


def test_a_number_that_is_none_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash, "varlen_attn", lambda *arguments, **options: torch.nan * kernel(*arguments, **options))
    assert "wrong by nan" in str(tried("flash", CacheShape(1, 2, 16, 16, torch.bfloat16)))
