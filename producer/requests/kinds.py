"""The kinds of requests as their users write and read them, by the names of `jobs.requests.kinds`."""

from __future__ import annotations

from batchmill.jobs.errors import BatchmillError
from batchmill.producer.requests.forms import Forms
from batchmill.producer.requests.generation import GENERATION

FORMS: dict[str, Forms] = {each.name: each for each in (GENERATION,)}


def forms_of(kind: str) -> Forms:
    """The forms of the kind of this name. Raises BatchmillError for one of another batchmill."""
    if kind not in FORMS:
        raise BatchmillError(
            f"this batchmill writes no answers to requests of kind {kind!r}: use the one that submitted"
        )
    return FORMS[kind]
