"""Speeds of a machine's workers so far: tokens per second of runs that ended, by model, device and worker."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import func, select

from batchmill.jobs.models.quantization import Quantization
from batchmill.jobs.models.spec import ModelSpec
from batchmill.jobs.store.database.database import Database
from batchmill.jobs.store.tables import runs, workers


@dataclass(frozen=True, slots=True)
class Speed:
    """The work of one spec's workers on one kind of device."""

    quantization: Quantization
    device_name: str
    runs: int
    #: Tokens of answers.
    completion_tokens: int
    #: The seconds that at least one run took, each worker's own and added, so that `tokens_per_second` is one worker's.
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.completion_tokens / self.seconds


class SpeedView:
    """Speeds, read from the runs; a worker's runs overlap, since it reads ahead, so that their times are united."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def of(self, spec: ModelSpec, *, host: str) -> list[Speed]:
        """The speeds of a model at one revision, by quantization, on one machine; runs without tokens do not count."""
        larger = self._database.larger
        before = func.max(runs.c.finished_at).over(
            partition_by=runs.c.worker_id, order_by=(runs.c.started_at, runs.c.id), rows=(None, -1)
        )
        each = (
            select(
                workers.c.quantization,
                workers.c.device_name,
                runs.c.started_at.label("began"),
                runs.c.finished_at.label("ended"),
                func.coalesce(before, runs.c.started_at).label("covered"),
                runs.c.completion_tokens.label("tokens"),
            )
            .join_from(runs, workers, workers.c.id == runs.c.worker_id)
            .where(workers.c.host == host, workers.c.model == spec.model)
            .where(workers.c.revision.is_not_distinct_from(spec.revision))
            .where(runs.c.finished_at.is_not(None), runs.c.completion_tokens > 0, workers.c.device_name.is_not(None))
            .subquery()
        )
        busy = func.sum(larger(each.c.ended - larger(each.c.began, each.c.covered), 0.0)).label("seconds")
        names = (each.c.quantization, each.c.device_name)
        summed = select(*names, func.count().label("runs"), func.sum(each.c.tokens).label("tokens"), busy)
        with self._database.read() as connection:
            rows = connection.execute(summed.group_by(*names).order_by(*names)).all()
        return [
            Speed(Quantization.parse(row.quantization), row.device_name, row.runs, int(row.tokens), row.seconds)
            for row in rows
            if row.seconds > 0
        ]
