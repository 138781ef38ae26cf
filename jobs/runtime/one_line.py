"""A text of any lines, as one line that is not too long."""

from __future__ import annotations

_LONGEST = 300


def one_line(text: str) -> str:
    """A reason, of however many lines, as one that is not too long."""
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..."
