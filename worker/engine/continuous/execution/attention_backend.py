"""The door into a transformers model: an attention function under a name of its own, called by its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

from transformers import AttentionInterface, PreTrainedModel

_NUMBERS = count()


def register(attention: Callable[..., Any]) -> str:
    """The name under which models know this function from now on."""
    name = f"batchmill-{next(_NUMBERS)}"
    AttentionInterface.register(name, attention)
    return name


@contextmanager
def attention_backend(model: PreTrainedModel, name: str) -> Iterator[None]:
    """The model's layers call this function; afterwards it is as it was, for whoever else calls it."""
    before, model.config._attn_implementation = model.config._attn_implementation, name
    try:
        yield
    finally:
        model.config._attn_implementation = before
