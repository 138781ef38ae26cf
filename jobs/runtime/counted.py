"""A number with its noun, for people: `1 batch`, `2,000 batches`."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """`noun` is the singular."""
    plural = f"{noun}es" if noun.endswith("ch") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"
