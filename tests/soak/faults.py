"""The faults: each breaks something, waits, and mends it. A generator that yields for how many seconds it waits.

What it mends stands in a `finally`, so that closing the generator mends it too. They run in the main thread, one step
at a time; what several of them must not break at once is named beside them.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from random import Random
from typing import Any

import psutil
from kombu import Queue

from jobs.broker import make_app
from jobs.errors import StoreError
from jobs.gate import WAKE_TASK
from tests.soak import looks, measures
from tests.soak.measures import Measures
from tests.soak.posts import Post, Row
from tests.soak.world import ECHO_QUEUE, World

Steps = Iterator[float]
#: Longer than the bound for a dead host, so that nobody starts the worker again meanwhile.
_DEAD_SECONDS = 125.0
_LOCK_TRIES = 100


class Faults:
    """Every kind of fault, on the workers given and on what they need."""

    def __init__(self, world: World, found: Measures, posts: list[Post], random: Random) -> None:
        self._world, self._found, self._random = world, found, random
        self._here = [post for post in posts if not post.host]
        self._elsewhere = [post for post in posts if post.host]
        self._posts = posts
        #: {name: (the fault, how often it is chosen, what it breaks alone)}
        self.kinds: dict[str, tuple[Callable[[], Steps], int, str]] = {
            "child killed": (self._kill_child, 6, ""),
            "parent killed": (self._kill_parent, 3, ""),
            "host dead": (self._kill_host, 2, "host"),
            "child frozen": (self._freeze_child, 2, "frozen"),
            "worker ended": (self._end_worker, 4, ""),
            "all workers ended twice": (self._storm, 1, "storm"),
            "Redis emptied": (self._empty_redis, 2, ""),
            "Redis killed": (self._kill_redis, 1, "redis"),
            "Redis away": (self._redis_away, 1, "redis"),
            "Redis silent": (self._blackhole, 1, "redis"),
            "connections reset": (self._reset, 2, "redis"),
            "Redis slow": (self._latency, 1, "redis"),
            "wake-ups doubled": (self._double, 2, ""),
            "store away": (self._store_away, 2, "store"),
        }

    # --- workers --------------------------------------------------------------------------------------------------

    def _kill_child(self) -> Steps:
        post = self._random.choice(self._posts)
        child, row = post.child(), post.row()
        held = self._held(row)
        if child is None:
            return
        with suppress(psutil.NoSuchProcess):
            child.kill()
            self._found.mended(self._found.broken(post.name))
            if row is not None and row.child_pid == child.pid and row.state == "ready":
                self._watch(measures.READY, post, looks.is_ready, row)
                if held is not None and held.requests:
                    self._watch(measures.AGAIN, post, looks.runs_again, held)
        self._note("SIGKILL child", post, row)
        yield 0.0

    def _kill_parent(self) -> Steps:
        post = self._random.choice(self._here)
        self._kill_whole(post, measures.ORPHANS, child_too=False)
        yield 0.0

    def _kill_host(self) -> Steps:
        post = self._random.choice(self._elsewhere or self._here)
        kind = measures.DEAD_HOST if post.host else measures.ORPHANS
        with self._breaking(post.name):
            self._kill_whole(post, kind, child_too=True)
            post.rest(_DEAD_SECONDS)
            yield _DEAD_SECONDS

    def _kill_whole(self, post: Post, kind: measures.Kind, *, child_too: bool) -> None:
        child, row = post.child(), post.row()
        holds = row is not None and looks.or_none(looks.has_no_leases, self._world, row.worker_id) is False
        post.kill()
        if child is not None and child_too:
            with suppress(psutil.NoSuchProcess):
                child.kill()
        self._found.mended(self._found.broken(post.name))
        if row is not None and holds:
            self._watch(kind, post, looks.has_no_leases, row.worker_id)
        if child is not None and not child_too:
            self._found.watch(measures.ORPHAN_CHILD, lambda: not child.is_running(), worker=post.name)
        self._note("SIGKILL parent and child" if child_too else "SIGKILL parent", post, row)

    def _freeze_child(self) -> Steps:
        post = self._random.choice(self._posts)
        child, row = post.child(), post.row()
        if child is None:
            return
        seconds = self._random.uniform(10, 100)
        self._note(f"SIGSTOP child for {seconds:.0f} s", post, row)
        with self._breaking(post.name):
            try:
                with suppress(psutil.NoSuchProcess):
                    child.suspend()
                yield seconds
            finally:
                with suppress(psutil.NoSuchProcess):
                    child.resume()

    def _end_worker(self) -> Steps:
        post = self._random.choice(self._posts)
        self._end(post)
        yield 0.0

    def _storm(self) -> Steps:
        for wait in (self._random.uniform(4, 10), 0.0):
            for post in self._posts:
                self._end(post)
            yield wait

    def _end(self, post: Post) -> None:
        if post.alive and post.asked_to_end_at is None:
            post.terminate()
            self._found.mended(self._found.broken(post.name))
            self._world.note("SIGTERM", worker=post.name, phase=post.asked_phase)

    # --- Redis ----------------------------------------------------------------------------------------------------

    def _empty_redis(self) -> Steps:
        newest = looks.or_none(looks.newest_run, self._world)
        with suppress(OSError, Exception), self._world.redis() as client:
            client.flushall()
            self._world.note("FLUSHALL")
            if isinstance(newest, int):
                self._watch(measures.EMPTIED, None, looks.is_moving, newest)
        yield 0.0

    def _kill_redis(self) -> Steps:
        self._world.note("Redis killed and started empty")
        with self._breaking("redis"):
            self._world.server.kill()
            self._world.server.start()
        self._redis_is_back()
        yield 0.0

    def _redis_away(self) -> Steps:
        seconds = self._random.uniform(20, 60)
        self._world.note(f"Redis away for {seconds:.0f} s")
        with self._breaking("redis"):
            self._world.server.kill()
            try:
                yield seconds
            finally:
                self._world.server.start()
        self._redis_is_back()

    def _blackhole(self) -> Steps:
        self._world.note("Redis silent for 30 s")
        with self._breaking("redis"):
            self._world.proxy.blackhole()
            try:
                yield 30.0
            finally:
                self._world.proxy.heal()
        self._redis_is_back()

    def _reset(self) -> Steps:
        times = self._random.randint(1, 5)
        self._world.note(f"connections to Redis reset {times} times")
        with self._breaking("redis"):
            for _ in range(times):
                self._world.proxy.reset()
                yield 0.5

    def _latency(self) -> Steps:
        seconds = self._random.uniform(0.05, 0.5)
        self._world.note(f"Redis {seconds:.2f} s late for 20 s")
        with self._breaking("redis"):
            self._world.proxy.latency(seconds)
            try:
                yield 20.0
            finally:
                self._world.proxy.heal()

    def _redis_is_back(self) -> None:
        newest = looks.or_none(looks.newest_run, self._world)
        if isinstance(newest, int):
            self._watch(measures.REDIS_BACK, None, looks.is_moving, newest)

    def _double(self) -> Steps:
        """The same wake-up ten times."""
        batch_id = looks.or_none(looks.some_batch, self._world) or 1
        app = make_app(f"redis://127.0.0.1:{self._world.server.port}/0", socket_seconds=1)
        with suppress(Exception):  # Redis may be away
            for _ in range(10):
                app.signature(WAKE_TASK).apply_async((batch_id,), queue=Queue(ECHO_QUEUE), retry=False)
            self._world.note("a wake-up sent ten times", batch=batch_id)
        app.close()
        yield 0.0

    # --- the store ------------------------------------------------------------------------------------------------

    def _store_away(self) -> Steps:
        away = self._lock_sqlite if self._world.postgresql is None else self._stop_postgresql
        count = looks.or_none(looks.outputs_count, self._world)
        with self._breaking("store"):
            yield from away()
        if isinstance(count, int):
            self._found.watch(measures.STORE_BACK, partial(looks.is_saving, self._world, count))

    def _stop_postgresql(self) -> Steps:
        assert self._world.postgresql is not None
        seconds = self._random.uniform(10, 30)
        self._world.note(f"PostgreSQL stopped at once for {seconds:.0f} s")
        self._world.postgresql.stop_immediately()
        try:
            yield seconds
        finally:
            self._world.postgresql.start()

    def _lock_sqlite(self) -> Steps:
        seconds = self._random.uniform(5, 20)
        other = sqlite3.connect(self._world.settings.database_file, timeout=0.1, isolation_level=None)
        try:
            for _ in range(_LOCK_TRIES):
                with suppress(sqlite3.OperationalError):
                    other.execute("BEGIN EXCLUSIVE")
                    break
                yield 0.05
            self._world.note(f"SQLite locked for {seconds:.0f} s")
            yield seconds
        finally:
            other.close()

    # --- what they share ------------------------------------------------------------------------------------------

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
