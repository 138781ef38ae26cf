"""Base of the faults: the mill that they break, and the watches by which its recovery is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from random import Random
from typing import Any

from batchmill.jobs.errors import StoreError
from tests.tools.soak import looks, measures
from tests.tools.soak.measures import Measures
from tests.tools.soak.posts import Post, Row
from tests.tools.soak.world import World

#: The steps of a fault: for how many seconds it waits each time.
Steps = Iterator[float]


class Scene:
    """The mill, what is measured of it, and chance."""

    def __init__(self, world: World, found: Measures, random: Random) -> None:
        self._world, self._found, self._random = world, found, random

    def _watch(self, kind: measures.Kind, post: Post | None, look: Callable[..., bool], argument: Any) -> None:
        self._found.watch(kind, partial(look, self._world, argument), worker=post.name if post else "")

    def _breaking(self, scope: str) -> _Breaking:
        return _Breaking(self._found, scope)

    def _held(self, row: Row | None) -> looks.Held | None:
        with suppress(StoreError):
            return None if row is None else looks.held_by(self._world, row)
        return None

    def _note(self, what: str, post: Post, row: Row | None) -> None:
        of = {"worker_id": row.worker_id, "generation": row.generation, "state": row.state} if row else {}
        self._world.note(what, worker=post.name, **of)


class _Breaking:
    """Something is broken as long as the block runs."""

    def __init__(self, found: Measures, scope: str) -> None:
        self._found = found
        self._scope = scope

    def __enter__(self) -> None:
        self._breakage = self._found.broken(self._scope)

    def __exit__(self, *_: object) -> None:
        self._found.mended(self._breakage)
