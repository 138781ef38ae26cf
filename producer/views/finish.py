"""The line about how the answers of a job ended: by themselves, or at `max_tokens`, which cuts them short."""

from __future__ import annotations

from batchmill.jobs.runtime.counted import counted
from batchmill.jobs.store.views.jobs import Job


def finish_line(job: Job) -> str | None:
    """`704 stop, 1,296 length (65 %): raise ...`; None where no answer is there, or nobody counted them."""
    reasons = job.counts.finish_reasons
    if reasons is None or not reasons.stop + reasons.length:
        return None
    if not reasons.length:
        return f"{reasons.stop:,} stop"
    share = 100 * reasons.length / (reasons.stop + reasons.length)
    shown = f"{share:.0f} %" if share >= 1 else "under 1 %"
    line = f"{reasons.stop:,} stop, {reasons.length:,} length ({shown})"
    return line if _is_meant(job) else f"{line}: raise --max-tokens, or that of the lines"


def answered_line(job: Job) -> str:
    """`7 of 20 requests were answered`"""
    succeeded, total = job.counts.succeeded, job.counts.total
    return f"{succeeded:,} of {counted(total, 'request')} {'was' if 1 in (succeeded, total) else 'were'} answered"


def _is_meant(job: Job) -> bool:
    """True where every answer is as long as asked for, whatever the model says."""
    return bool((job.sampling or job.options).get("ignore_eos"))
