"""How much an engine puts on its device at once: less after its memory ran out, and slowly more again.

Sizes are in the engine's own unit: cache places, or rows. It knows no device; what was found is kept by who asks
`found`, so that the next process of the same device begins with it.
"""

from __future__ import annotations

#: So many pieces of work of nearly the full size have to succeed before the size grows by a tenth.
CLEAN_STEPS = 10
_NEARLY = 0.5


class Capacity:
    """`limit`: the size planned for. `most`: what it never exceeds. `found`: None until memory ran out once."""

    def __init__(self, most: int, *, found: int | None = None) -> None:
        self._most = most
        self._clean = 0
        self.found = found
        self.limit = most if found is None else max(1, min(most, found))

    def too_much(self, size: int) -> None:
        """The device could not hold a piece of this size: half of it is planned for."""
        self.limit = max(1, min(self.limit, size) // 2)
        self.found = self.limit
        self._clean = 0

    def held(self, size: int) -> None:
        """The device held a piece of this size."""
        if self.found is None or self.limit >= self._most or size < _NEARLY * self.limit:
            return
        self._clean += 1
        if self._clean >= CLEAN_STEPS:
            self.limit = min(self._most, self.limit + max(1, self.limit // 10))
            self.found = self.limit
            self._clean = 0
