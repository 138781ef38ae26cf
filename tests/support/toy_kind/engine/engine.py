"""Counts the words of all sentences that wait, in one step."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from batchmill.jobs.models.engine_facts import EngineLimits
from batchmill.jobs.requests.request import Output, RequestKey
from batchmill.worker.engine.capacity import Capacity
from tests.support.toy_kind.jobs_side import COUNT, Count, CountRequest


class CountEngine:
    """Splits at `separator` where the job has settled on nothing else."""

    kinds = frozenset({COUNT.name})
    active = 0
    cache_bytes = 0

    def __init__(self, *, separator: str = " ", rows: int = 4) -> None:
        self.limits = EngineLimits("count", rows)
        self.defaults = separator
        self.capacity = Capacity(rows)
        self._waiting: dict[RequestKey, CountRequest] = {}

    @staticmethod
    def admission_order(requests: Sequence[CountRequest]) -> Sequence[CountRequest]:
        return requests

    def close(self) -> None:
        """Does nothing: nothing runs beside a step."""

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def add(self, key: RequestKey, request: CountRequest) -> None:
        self._waiting[key] = request

    def cancel(self, keys: Collection[RequestKey]) -> None:
        for key in keys:
            self._waiting.pop(key, None)

    def tokens_so_far(self) -> Mapping[RequestKey, int]:
        return {}

    def step(self) -> list[Output]:
        batch, self._waiting = self._waiting, {}
        return [Output(key, (Count(len(each.sentence.split(each.separator))),), 1) for key, each in batch.items()]
