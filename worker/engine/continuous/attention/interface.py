"""Lets a model's layers call an attention function of the engine.

transformers keeps the functions of a process in one table for good. The one that is registered here stands for the
function of the forward that runs, so that a function and its cache end with their engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from transformers import AttentionInterface, PreTrainedModel

_NAME = "batchmill"
_current: ContextVar[Callable[..., Any]] = ContextVar("attention")


def _attend(*arguments: Any, **options: Any) -> Any:
    return _current.get()(*arguments, **options)


AttentionInterface.register(_NAME, _attend)


@contextmanager
def attention_function(model: PreTrainedModel, function: Callable[..., Any]) -> Iterator[None]:
    """A context in which the model's layers call this function; afterwards the model is as it was."""
    before, model.config._attn_implementation = model.config._attn_implementation, _NAME
    token = _current.set(function)
    try:
        yield
    finally:
        _current.reset(token)
        model.config._attn_implementation = before
