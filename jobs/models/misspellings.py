"""Names of models that are likely slips of the keyboard: one that nobody knows here, beside one that somebody does.

It does not judge `org/name`, which the Hub alone knows, nor a folder or a cached model.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from batchmill.jobs.errors import UsageError
from batchmill.jobs.models.hub_cache import cached_names
from batchmill.jobs.models.spec import DEMO, ECHO, ModelSpec

#: The share of letters in the same order from which two names are alike: one letter of four may differ.
_ALIKE = 0.7


def meant_instead(spec: ModelSpec, *, served: Iterable[str] = ()) -> str | None:
    """The known model that this name resembles; None where it is known, or like none. `served`: models of workers."""
    if "/" in spec.model or spec.model in (DEMO, ECHO):
        return None
    cached = cached_names()
    known = {_short(each): each for each in (*cached, *served, DEMO, ECHO)}
    if spec.model in known.values():
        return None
    alike = get_close_matches(_short(spec.model), known, n=1, cutoff=_ALIKE)
    return known[alike[0]] if alike else None


def slip_line(spec: ModelSpec, meant: str) -> str:
    """The question, for a warning and for an error."""
    return f"{spec.model!r} is no folder here, no cached model and no org/name: did you mean {meant}?"


def refuse_slip(spec: ModelSpec, *, served: Iterable[str] = ()) -> None:
    """Raises UsageError with that question where the name is likely a slip."""
    if (meant := meant_instead(spec, served=served)) is not None:
        raise UsageError(slip_line(spec, meant))


def _short(name: str) -> str:
    return name.rstrip("/").rsplit("/", 1)[-1].casefold()
