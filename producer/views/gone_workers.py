"""Workers of this machine whose processes are gone, which this machine knows before the store does.

A worker that was killed sends no more heartbeats, and the store takes it for alive until they are missed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from batchmill.jobs.runtime.process.process import Lives, Process
from batchmill.jobs.store.views.blockers import Surroundings
from batchmill.jobs.store.views.seen_workers import SeenWorker
from batchmill.jobs.store.views.workers import WorkerRow

_Worker = TypeVar("_Worker", WorkerRow, SeenWorker)


def is_gone(process: Process | None) -> bool:
    """True where a process was of this machine and has ended."""
    return process is not None and process.is_of_this_boot and process.lives() is Lives.NO


def seen_here(worker: _Worker) -> _Worker:
    """The same worker, dead at once where its process is gone."""
    if not worker.alive or not is_gone(worker.process):
        return worker
    if isinstance(worker, WorkerRow):
        return replace(worker, alive=False, uptime_seconds=max(0.0, worker.uptime_seconds - worker.seen_seconds))
    return replace(worker, alive=False)


def around_here(around: Surroundings) -> Surroundings:
    """The same surroundings, with every worker as it is seen here."""
    return replace(
        around,
        holds=tuple(replace(each, worker=seen_here(each.worker)) for each in around.holds),
        crashes=tuple(replace(each, worker=seen_here(each.worker)) for each in around.crashes),
        serving=tuple(map(seen_here, around.serving)),
        others=tuple(each for each in map(seen_here, around.others) if each.alive),
        live=tuple(each for each in around.live if not is_gone(each)),
    )
