"""The faults, and how often each comes: a generator breaks something, waits, and mends it.

What it mends stands in a `finally`, so that closing the generator mends it too. They run in the main thread, one step
at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from tests.tools.soak.measures import Measures
from tests.tools.soak.posts import Post
from tests.tools.soak.redis_faults import RedisFaults
from tests.tools.soak.scene import Steps
from tests.tools.soak.store_faults import StoreFaults
from tests.tools.soak.worker_faults import WorkerFaults
from tests.tools.soak.world import World


@dataclass(frozen=True, slots=True)
class Kind:
    """One fault; `weight`: how often it is chosen; `alone`: what no other one may break meanwhile."""

    begin: Callable[[], Steps]
    weight: int
    alone: str = ""


def kinds(world: World, found: Measures, posts: list[Post], random: Random) -> dict[str, Kind]:
    """Every kind of fault, on these workers and on what they need, by its name."""
    workers = WorkerFaults(world, found, posts, random)
    redis = RedisFaults(world, found, random)
    store = StoreFaults(world, found, random)
    return {
        "child killed": Kind(workers.kill_child, 6),
        "parent killed": Kind(workers.kill_parent, 3),
        "host dead": Kind(workers.kill_host, 2, "host"),
        "child frozen": Kind(workers.freeze_child, 2, "frozen"),
        "worker frozen": Kind(workers.freeze_worker, 2, "frozen"),
        "worker ended": Kind(workers.end_worker, 4),
        **({"container restarted": Kind(workers.restart_container, 2)} if workers.has_containers else {}),
        "all workers ended twice": Kind(workers.storm, 1, "storm"),
        "Redis emptied": Kind(redis.empty_redis, 2),
        "Redis killed": Kind(redis.kill_redis, 1, "redis"),
        "Redis away": Kind(redis.redis_away, 1, "redis"),
        "Redis silent": Kind(redis.blackhole, 1, "redis"),
        "connections reset": Kind(redis.reset, 2, "redis"),
        "Redis slow": Kind(redis.latency, 1, "redis"),
        "Redis full": Kind(redis.fill_redis, 1, "redis"),
        "Redis with a new password": Kind(redis.change_password, 1, "redis"),
        "wake-ups doubled": Kind(redis.double, 2),
        "store away": Kind(store.store_away, 2, "store"),
        "clock set back": Kind(store.set_clock_back, 1, "store"),
    }
