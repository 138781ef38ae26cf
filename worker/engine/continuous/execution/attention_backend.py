"""Registers attention functions with transformers, and lets a model's layers call one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

from transformers import AttentionInterface, PreTrainedModel

_NUMBERS = count()


def register(attention: Callable[..., Any]) -> str:
    """Registers this function with transformers. Returns its name."""
    name = f"batchmill-{next(_NUMBERS)}"
    AttentionInterface.register(name, attention)
    return name


@contextmanager
def attention_backend(model: PreTrainedModel, name: str) -> Iterator[None]:
    """A context in which the model's layers call this function; afterwards the model is as it was."""
    before, model.config._attn_implementation = model.config._attn_implementation, name
    try:
        yield
    finally:
        model.config._attn_implementation = before
