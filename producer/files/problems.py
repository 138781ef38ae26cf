"""The bad lines of one prompt file: the first few of each error are named, the rest are counted.

Its memory does not grow with them, and it knows neither files nor what is wrong with a line.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from batchmill.jobs.runtime.counted import counted

#: The most bad lines that are named, and the most of them that have the same error.
MAX_NAMED = 100
MAX_NAMED_OF_ERROR = 5
#: Errors that differ by such figures alone are the same.
_FIGURES = re.compile(r"\b0x[0-9a-f]+|-?\d[\d,.]*")


@dataclass(slots=True)
class _Error:
    """One error, and the lines that have it."""

    named: int = 0  #: the number of lines that are named
    last: int = 0  #: the last of these
    more: int = 0  #: the number of lines that are only counted


class Problems:
    """Bad lines, in whatever order they are found; `count` is of all of them."""

    def __init__(self) -> None:
        self.count = 0
        self._named: list[tuple[int, str]] = []
        self._errors: dict[str, _Error] = {}

    def add(self, number: int, what: str, error: str | None = None) -> None:
        """Adds line `number`; `error`: what all lines with the same error have in common, if it is not `what`."""
        self.count += 1
        key = error or _FIGURES.sub("0", what)
        known = self._errors.get(key)
        full = len(self._named) == MAX_NAMED
        if known is not None and (full or known.named == MAX_NAMED_OF_ERROR):
            known.more += 1
        elif not full:
            known = self._errors.setdefault(key, _Error())
            known.named += 1
            known.last = max(known.last, number)
            self._named.append((number, what))

    @property
    def unsaid(self) -> int:
        """The number of lines that are neither named nor counted with those of their error."""
        return self.count - len(self._named) - sum(each.more for each in self._errors.values())

    def lines(self, path: str) -> list[str]:
        """A line for each that is named, in the order of the file, and for the rest of its error one below the last."""
        more = {each.last: each.more for each in self._errors.values() if each.more}
        lines = []
        for number, what in sorted(self._named):
            lines.append(f"{path}:{number}: {what}")
            if count := more.get(number):
                lines.append(f"... and {counted(count, 'more line')} with this error")
        return lines
