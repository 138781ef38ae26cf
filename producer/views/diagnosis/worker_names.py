"""Workers as the findings name them: one with its machine and device, several in a list, and the log of one."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from batchmill.jobs.store.views.seen_workers import SeenWorker
from batchmill.jobs.store.views.workers import WorkerRow

#: The most workers that a finding names.
MOST_NAMES = 3


def log_of(worker: SeenWorker | WorkerRow) -> str:
    """The command that shows its log, and the machine to run it on."""
    return f"`{shlex.join(['batchmill', 'logs', worker.name])}` on {worker.host}"


def shown(worker: SeenWorker) -> str:
    """`worker a on host (cuda:0)`"""
    return f"worker {worker.name} on {worker.host} ({worker.device})"


def names(workers: Sequence[SeenWorker]) -> str:
    """`worker a on host`, or `workers a on host, b on host and 4 more`."""
    listed = ", ".join(f"{each.name} on {each.host}" for each in workers[:MOST_NAMES])
    more = f" and {len(workers) - MOST_NAMES} more" if len(workers) > MOST_NAMES else ""
    return f"worker{'s' if len(workers) > 1 else ''} {listed}{more}"
