"""Faults of workers: killed, frozen, ended, restarted, alone and all at once."""

from __future__ import annotations

import sqlite3
from contextlib import closing, nullcontext, suppress
from random import Random

import psutil

from tests.tools.soak import looks, measures
from tests.tools.soak.measures import Measures
from tests.tools.soak.posts import Post
from tests.tools.soak.scene import Scene, Steps
from tests.tools.soak.world import World

#: Longer than the bound for a dead host, so that nobody starts the worker again meanwhile.
_DEAD_SECONDS = 125.0


class WorkerFaults(Scene):
    """`posts`: those of this host and of another one; what is in a container meets its restarts alone."""

    def __init__(self, world: World, found: Measures, posts: list[Post], random: Random) -> None:
        super().__init__(world, found, random)
        self._contained = [post for post in posts if post.contained]
        self._posts = [post for post in posts if not post.contained]
        self._here = [post for post in self._posts if not post.host]
        self._elsewhere = [post for post in self._posts if post.host]
        self._frozen: set[str] = set()

    def kill_child(self) -> Steps:
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

    def kill_parent(self) -> Steps:
        post = self._random.choice(self._here)
        self._kill_whole(post, measures.ORPHANS, child_too=False)
        yield 0.0

    def kill_host(self) -> Steps:
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

    def freeze_child(self) -> Steps:
        post = self._random.choice(self._posts)
        child = post.child()
        if child is not None:
            yield from self._freeze(post, [child], "SIGSTOP child")

    def freeze_worker(self) -> Steps:
        """As a laptop that sleeps does it, or a cgroup that is frozen."""
        post = self._random.choice(self._posts)
        child = post.child()
        if child is not None and post.process is not None and post.asked_to_end_at is None:
            yield from self._freeze(post, [psutil.Process(post.process.pid), child], "SIGSTOP parent and child")

    def _freeze(self, post: Post, processes: list[psutil.Process], what: str) -> Steps:
        seconds = self._random.uniform(10, 100)
        self._note(f"{what} for {seconds:.0f} s", post, post.row())
        self._frozen.add(post.name)
        try:
            for each in processes:
                with suppress(psutil.NoSuchProcess):
                    each.suspend()
            with self._breaking(post.name), self._breaking("store") if self._is_locked() else nullcontext():
                yield seconds
        finally:
            self._frozen.discard(post.name)
            for each in processes:
                with suppress(psutil.NoSuchProcess):
                    each.resume()

    def _is_locked(self) -> bool:
        """True where the frozen process was in a transaction on SQLite, whose lock it holds until it goes on."""
        if self._world.postgresql is not None:
            return False
        with closing(sqlite3.connect(self._world.settings.database_file, timeout=3, isolation_level=None)) as other:
            try:
                other.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError:
                self._world.note("frozen in a transaction: SQLite is locked meanwhile")
                return True
        return False

    def end_worker(self) -> Steps:
        post = self._random.choice(self._posts)
        self._end(post)
        yield 0.0

    @property
    def has_containers(self) -> bool:
        return bool(self._contained)

    def restart_container(self) -> Steps:
        """As `docker kill` and a start do it: everything in it dies, and the next worker is process 1 again."""
        for post in self._contained:
            row = post.row()
            holds = row is not None and looks.or_none(looks.has_no_leases, self._world, row.worker_id) is False
            post.kill()
            self._found.mended(self._found.broken(post.name))
            if row is not None and holds:
                self._watch(measures.CONTAINER, post, looks.has_no_leases, row.worker_id)
            self._note("container restarted", post, row)
        yield 0.0

    def storm(self) -> Steps:
        for wait in (self._random.uniform(4, 10), 0.0):
            for post in self._posts:
                self._end(post)
            yield wait

    def _end(self, post: Post) -> None:
        if post.alive and post.asked_to_end_at is None and post.name not in self._frozen:
            post.terminate()
            self._found.mended(self._found.broken(post.name))
            self._world.note("SIGTERM", worker=post.name, phase=post.asked_phase)
