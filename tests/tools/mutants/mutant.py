"""A mutant: the mill without one guard, as edits of its files."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Edit:
    """One text of one file, and what stands there instead."""

    file: str
    old: str
    new: str


@dataclass(frozen=True, slots=True)
class Mutant:
    """A mill without one guard."""

    guard: str
    edits: tuple[Edit, ...]
    #: Arguments of pytest, each run until one of them is red.
    tests: tuple[str, ...]
