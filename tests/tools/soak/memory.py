"""Samples the resident memory of each process of the mill, and computes how fast it grows."""

from __future__ import annotations

from dataclasses import dataclass, field
from time import monotonic

import psutil

from tests.tools.soak.posts import Post

EVERY_SECONDS = 10.0
#: Memory that a process takes while it starts does not count as growth.
_WARM_SECONDS = 60.0
_MIB = 2**20


@dataclass(slots=True)
class Life:
    """One process: its samples as (seconds, bytes)."""

    name: str
    samples: list[tuple[float, int]] = field(default_factory=list)

    @property
    def warm(self) -> list[tuple[float, int]]:
        return [each for each in self.samples if each[0] - self.samples[0][0] >= _WARM_SECONDS]

    @property
    def seconds(self) -> float:
        """Over which a slope is taken."""
        return self.warm[-1][0] - self.warm[0][0] if self.warm else 0.0

    def slope_mib_per_hour(self, *, half: bool = False) -> float:
        """By least squares; `half`: over the second half alone."""
        points = self.warm[len(self.warm) // 2 :] if half else self.warm
        count = len(points)
        middle = sum(second for second, _ in points) / count
        spread = sum((second - middle) ** 2 for second, _ in points)
        return sum((second - middle) * size for second, size in points) / spread * 3600 / _MIB if spread else 0.0

    def __str__(self) -> str:
        warm = self.warm
        return (
            f"{self.slope_mib_per_hour():+.2f} MiB/h, second half {self.slope_mib_per_hour(half=True):+.2f} "
            f"({warm[0][1] / _MIB:.1f} to {warm[-1][1] / _MIB:.1f} MiB in {self.seconds / 60:.0f} min)"
        )


class Memory:
    """All processes that were ever seen."""

    def __init__(self) -> None:
        self._lives: dict[tuple[int, float], Life] = {}
        self._due = 0.0

    def sample(self, posts: list[Post]) -> None:
        """Takes samples when it is time."""
        if monotonic() < self._due:
            return
        self._due = monotonic() + EVERY_SECONDS
        for post in posts:
            parent = post.parent()
            if parent is not None:
                self._take(f"{post.name} parent", parent.pid)
            child = post.child()
            if child is not None:
                self._take(f"{post.name} child", child.pid)

    def lives(self, *, at_least_seconds: float) -> list[Life]:
        return [each for each in self._lives.values() if each.seconds >= at_least_seconds]

    def _take(self, name: str, pid: int) -> None:
        try:
            process = psutil.Process(pid)
            life = self._lives.setdefault((pid, process.create_time()), Life(name))
            life.samples.append((monotonic(), process.memory_info().rss))
        except psutil.Error:
            return
