"""The log lines about batches: each has the id of its job, by which `batchmill logs JOB` finds it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from batchmill.jobs.requests.states import RunOutcome
from batchmill.jobs.runtime.logs import get_logger
from batchmill.jobs.store.leases.lease import BatchReport, SyncResult

log = get_logger(__name__)


def log_batches(reports: Iterable[BatchReport], result: SyncResult, *, worker_id: int) -> None:
    """Logs a line for each batch that begins, or that this worker no longer holds after a sync."""
    for claimed in result.claimed:
        lease = claimed.lease
        log.info(
            "batch begins",
            job=lease.job_id,
            batch=lease.batch_id,
            requests=len(claimed.requests),
            worker=worker_id,
        )
    job_of = {each.lease.batch_id: each.lease.job_id for each in reports}
    for event, ended in (
        ("batch finished", result.finished),
        ("batch cancelled", result.cancelled),
        ("batch handed back", result.released),
    ):
        for batch in sorted(ended):
            log.info(event, job=job_of.get(batch), batch=batch, worker=worker_id)
    for batch in sorted(result.lost):
        log.warning("lost a batch: its lease was taken back", job=job_of.get(batch), batch=batch, worker=worker_id)


def log_taken_back(held: Mapping[str, Sequence[int]], *, worker_id: int, outcome: RunOutcome) -> None:
    """Logs a line for each job of which a dead process of this worker held batches."""
    for job_id, batches in held.items():
        log.warning("took back leases", job=job_id, batches=len(batches), worker=worker_id, outcome=outcome.value)
