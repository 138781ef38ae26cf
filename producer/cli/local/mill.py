"""The parts of a mill that `run` and `up` share: its own Redis, and its end by a signal."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from batchmill.jobs.broker.embedded import EmbeddedRedis
from batchmill.jobs.configuration.settings import Settings
from batchmill.jobs.errors import UsageError
from batchmill.jobs.runtime.process.interrupts import interrupt


def require_embedded(settings: Settings) -> None:
    """Raises UsageError where the settings name a Redis or a store elsewhere."""
    for name, url in (("BATCHMILL_BROKER_URL", settings.broker_url), ("BATCHMILL_DATABASE_URL", settings.database_url)):
        if url:
            raise UsageError(f"run and up start their own Redis and store: unset {name}, or use `submit` and `worker`")


@contextmanager
def own_redis(settings: Settings) -> Iterator[EmbeddedRedis]:
    """Runs the embedded Redis of a home."""
    redis = EmbeddedRedis(settings.home)
    redis.start()
    try:
        yield redis
    finally:
        redis.stop()


@contextmanager
def ended_by_signal() -> Iterator[None]:
    """Has SIGTERM end a mill as Ctrl-C does, and both of them after a transaction that is under way."""
    numbers = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # and not ignored, as behind `nohup`
        numbers.append(signal.SIGINT)
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
