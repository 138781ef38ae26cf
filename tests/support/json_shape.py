"""The shape of a JSON object: its keys in their order, and the types of their values."""

from __future__ import annotations

from typing import Any


def check_shape(value: dict[str, Any], shape: dict[str, Any]) -> None:
    assert list(value) == list(shape)
    for key, kind in shape.items():
        if isinstance(kind, dict):
            check_shape(value[key], kind)
        else:
            assert isinstance(value[key], kind), key
