"""Rotary embeddings that turn all rows of a forward by its longest: from which lengths on, and who may run together.

`longrope` turns by other factors once a sequence is longer than the model was first trained for, and transformers asks
the longest row of a batch. `dynamic` begins beyond max_position_embeddings, which no row gets to.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

#: Rotary embeddings of these kinds turn all rows by the length of the longest.
_BY_LONGEST = {"dynamic", "longrope"}


class Stretched(NamedTuple):
    """One such embedding: its kind, and the length up to which it turns as trained, None if it does not say."""

    kind: str
    original_tokens: int | None


def stretched(config: Any) -> Iterator[Stretched]:
    """Those of a text model's configuration."""
    rotary = getattr(config, "rope_parameters", None) or {}
    for each in (rotary, *(each for each in rotary.values() if isinstance(each, dict))):
        if each.get("rope_type") in _BY_LONGEST:
            own = each.get("original_max_position_embeddings")
            yield Stretched(each["rope_type"], own or getattr(config, "original_max_position_embeddings", None))


class Turns:
    """How `generate` turns rows of a model: each as it would be alone, whoever is beside it.

    A row that stays within the original length runs with others that do, one whose prompt is longer with others of that
    kind, and one that comes to pass it by itself.
    """

    def __init__(self, config: Any, *, context_tokens: int | None) -> None:
        known = (each.original_tokens for each in stretched(config) if each.kind == "longrope")
        self._switches = sorted({each for each in known if each is not None})
        self._context_tokens = context_tokens

    def company(self, prompt_tokens: int, max_tokens: int) -> int | None:
        """Rows with the same number may run together; None for one that has to run alone."""
        begin, end = (
            sum(each < length for each in self._switches) for length in (prompt_tokens, prompt_tokens + max_tokens)
        )
        return begin if begin == end else None

    def most_tokens(self, company: int | None) -> int | None:
        """The length beyond which no row of such a company may seem to be, None for no limit."""
        if company is None or company == len(self._switches):
            return self._context_tokens
        return self._switches[company]
