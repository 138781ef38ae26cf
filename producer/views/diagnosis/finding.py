"""A finding: one fact about a job, and the remedy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Finding:
    """One fact about a job, and what to do about it."""

    code: str
    message: str
    remedy: str = ""
    stuck: bool = False  #: it keeps the job from moving until the user does something
