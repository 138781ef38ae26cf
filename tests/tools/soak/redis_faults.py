"""Faults of Redis: empty, dead, silent, slow, full, with another password; and wake-ups that come too often."""

from __future__ import annotations

from contextlib import suppress

from kombu import Queue

from batchmill.jobs.broker.client import make_app
from batchmill.jobs.broker.message_filter import WAKE_TASK
from tests.tools.soak import looks, measures
from tests.tools.soak.scene import Scene, Steps

_NEW_PASSWORD = "another"


class RedisFaults(Scene):
    """The faults of Redis, and of the connections between it and the workers."""

    def empty_redis(self) -> Steps:
        newest = looks.or_none(looks.newest_run, self._world)
        with suppress(OSError, Exception), self._world.redis() as client:
            client.flushall()
            self._world.note("FLUSHALL")
            if isinstance(newest, int):
                self._watch(measures.EMPTIED, None, looks.is_moving, newest)
        yield 0.0

    def kill_redis(self) -> Steps:
        self._world.note("Redis killed and started empty")
        with self._breaking("redis"):
            self._world.server.kill()
            self._world.server.start()
        self._redis_is_back()
        yield 0.0

    def redis_away(self) -> Steps:
        seconds = self._random.uniform(20, 60)
        self._world.note(f"Redis away for {seconds:.0f} s")
        with self._breaking("redis"):
            self._world.server.kill()
            try:
                yield seconds
            finally:
                self._world.server.start()
        self._redis_is_back()

    def blackhole(self) -> Steps:
        self._world.note("Redis silent for 30 s")
        with self._breaking("redis"):
            self._world.proxy.blackhole()
            try:
                yield 30.0
            finally:
                self._world.proxy.heal()
        self._redis_is_back()

    def reset(self) -> Steps:
        times = self._random.randint(1, 5)
        self._world.note(f"connections to Redis reset {times} times")
        with self._breaking("redis"):
            for _ in range(times):
                self._world.proxy.reset()
                yield 0.5

    def latency(self) -> Steps:
        seconds = self._random.uniform(0.05, 0.5)
        self._world.note(f"Redis {seconds:.2f} s late for 20 s")
        with self._breaking("redis"):
            self._world.proxy.latency(seconds)
            try:
                yield 20.0
            finally:
                self._world.proxy.heal()

    def fill_redis(self) -> Steps:
        """It takes no more wake-ups, and hands out none that is not there."""
        newest = looks.or_none(looks.newest_run, self._world)
        with suppress(Exception), self._world.redis() as client:
            client.config_set("maxmemory", 1)
            client.flushall()
            self._world.note("Redis full for 40 s")
            if isinstance(newest, int):
                self._watch(measures.FULL, None, looks.is_moving, newest)
        try:
            yield 40.0
        finally:
            with suppress(Exception), self._world.redis() as client:
                client.config_set("maxmemory", 0)

    def change_password(self) -> Steps:
        """Closes every connection, and lets no client in until the old password holds again."""
        newest = looks.or_none(looks.newest_run, self._world)
        with suppress(Exception), self._world.redis() as client:
            client.config_set("requirepass", _NEW_PASSWORD)
            client.client_kill_filter(_type="normal", skipme=True)
            self._world.note("Redis has a new password for 40 s")
            if isinstance(newest, int):
                self._watch(measures.LOCKED_OUT, None, looks.is_moving, newest)
        try:
            yield 40.0
        finally:
            with suppress(Exception), self._world.redis(password=_NEW_PASSWORD) as client:
                client.config_set("requirepass", "")

    def _redis_is_back(self) -> None:
        newest = looks.or_none(looks.newest_run, self._world)
        if isinstance(newest, int):
            self._watch(measures.REDIS_BACK, None, looks.is_moving, newest)

    def double(self) -> Steps:
        """The same wake-up ten times."""
        batch_id = looks.or_none(looks.some_batch, self._world) or 1
        app = make_app(f"redis://127.0.0.1:{self._world.server.port}/0", socket_seconds=1)
        with suppress(Exception):  # Redis may be away
            for _ in range(10):
                app.signature(WAKE_TASK).apply_async((batch_id,), queue=Queue(self._world.echo_queue), retry=False)
            self._world.note("a wake-up sent ten times", batch=batch_id)
        app.close()
        yield 0.0
