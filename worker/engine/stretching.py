"""RoPE scaling by the longest row of a batch: the lengths where it switches, and the rows that may run together.

`longrope` has other factors for sequences longer than the model was first trained for, and transformers chooses them
by the longest row of a batch. `dynamic` begins beyond max_position_embeddings, which no row gets to.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

#: Kinds of rotary embeddings that scale all rows by the length of the longest.
_BY_LONGEST = {"dynamic", "longrope"}


class Stretched(NamedTuple):
    """A rotary embedding that scales all rows by the length of the longest."""

    kind: str
    #: The length up to which it is not scaled; None where the configuration has none.
    original_tokens: int | None


def stretched(config: Any) -> Iterator[Stretched]:
    """Finds these embeddings in a text model's configuration."""
    rotary = getattr(config, "rope_parameters", None) or {}
    for rope in (rotary, *(part for part in rotary.values() if isinstance(part, dict))):
        if rope.get("rope_type") in _BY_LONGEST:
            own = rope.get("original_max_position_embeddings")
            yield Stretched(rope["rope_type"], own or getattr(config, "original_max_position_embeddings", None))


class Stretching:
    """The rows that `generate` may run together, so that each is scaled as it would be alone.

    A row that stays within the original length runs with others that do, and a row whose prompt is longer runs with
    others of that kind. A row that grows beyond that length runs alone.
    """

    def __init__(self, config: Any, *, context_tokens: int | None) -> None:
        known = (each.original_tokens for each in stretched(config) if each.kind == "longrope")
        self._switches = sorted({each for each in known if each is not None})
        self._context_tokens = context_tokens

    def company(self, prompt_tokens: int, max_tokens: int) -> int | None:
        """Numbers a row: rows of the same number may run together, and a row with None has to run alone."""
        begin, end = (
            sum(each < length for each in self._switches) for length in (prompt_tokens, prompt_tokens + max_tokens)
        )
        return begin if begin == end else None

    def most_tokens(self, company: int | None) -> int | None:
        """Returns the length that no row of such a company may appear to exceed, None for no limit."""
        if company is None or company == len(self._switches):
            return self._context_tokens
        return self._switches[company]
