"""The kinds of requests by their names, as the store keeps them with jobs."""

from __future__ import annotations

from typing import Any

from batchmill.jobs.errors import BatchmillError
from batchmill.jobs.requests.generation import GENERATION
from batchmill.jobs.requests.request import RequestKind

KINDS: dict[str, RequestKind[Any, Any]] = {each.name: each for each in (GENERATION,)}


def kind_named(name: str) -> RequestKind[Any, Any]:
    """The kind of this name. Raises BatchmillError for one of another batchmill."""
    if name not in KINDS:
        raise BatchmillError(f"this batchmill knows no requests of kind {name!r}: use the one that stored them")
    return KINDS[name]
