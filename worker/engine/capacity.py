"""The amount that an engine puts on its device at once: less after its memory ran out, and slowly more again.

Sizes are in the engine's own unit: cache places, or rows. It knows no device. The worker keeps `found`, so that the
next process of the same device begins with it.
"""

from __future__ import annotations

#: Pieces of work of nearly the full size that have to succeed before the limit grows by a tenth.
CLEAN_STEPS = 10
_NEARLY = 0.5


class Capacity:
    """A limit that halves when memory runs out, grows again by tenths, and never exceeds `ceiling`."""

    def __init__(self, ceiling: int, *, found: int | None = None) -> None:
        self._ceiling = ceiling
        self._clean = 0
        #: The limit that the device was found to hold; None until its memory ran out once.
        self.found = found
        #: The size to plan for.
        self.limit = ceiling if found is None else max(1, min(ceiling, found))

    def too_much(self, size: int) -> None:
        """Halves the limit after a piece of this size that the device could not hold."""
        self.limit = max(1, min(self.limit, size) // 2)
        self.found = self.limit
        self._clean = 0

    def held(self, size: int) -> None:
        """Counts a piece of this size that the device held, and raises the limit after enough of them."""
        if self.found is None or self.limit >= self._ceiling or size < _NEARLY * self.limit:
            return
        self._clean += 1
        if self._clean >= CLEAN_STEPS:
            self.limit = min(self._ceiling, self.limit + max(1, self.limit // 10))
            self.found = self.limit
            self._clean = 0
