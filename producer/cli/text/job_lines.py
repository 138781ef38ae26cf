"""The lines about one job, for people."""

from __future__ import annotations

import json
from typing import Any

from batchmill.jobs.models.device_memory import Memory
from batchmill.jobs.requests.states import JobState
from batchmill.jobs.runtime.one_line import one_line
from batchmill.jobs.runtime.sizes import size
from batchmill.jobs.runtime.times import utc
from batchmill.producer.cli.text.device_lines import memory_lines
from batchmill.producer.cli.text.evaluated import evaluated_line
from batchmill.producer.cli.text.worker_line import loading_line
from batchmill.producer.views.finish import answered_line, finish_line
from batchmill.producer.views.reasons import missing_lines
from batchmill.producer.views.status import JobStatus


def job_lines(status: JobStatus) -> list[str]:
    """The lines of `batchmill status` about a job, a fact each."""
    job, usage, counts = status.job, status.usage, status.job.counts
    title = f"job {job.id}" + (f" ({job.name})" if job.name else "")
    lines = [
        f"{title}: {job.state.value}" + (f", {answered_line(job)}" if job.state is JobState.CANCELLED else ""),
        f"  model      {job.spec}",
        f"  file       {job.file_name}, submitted {utc(job.queued_at)}",
        f"  requests   {counts.total:,} = {counts.succeeded:,} succeeded + {counts.failed:,} failed"
        f" + {counts.cancelled:,} cancelled + {counts.pending:,} pending",
        *([f"  finished   {finished}"] if (finished := finish_line(job)) else []),
        *(_work_lines(status) if usage.runs else [f"  seconds    {usage.queued_seconds:.1f} queued"]),
    ]
    if job.sampling:
        lines.append(f"  sampling   {_pairs(job.sampling)}")
    if declared := job.options.get("adapters"):
        meant = {each.name: each.where for each in job.adapters}
        shown = (f"{name} = {meant[name]}" if name in meant else f"{name} (not used yet)" for name in declared)
        lines.append(f"  adapters   {', '.join(shown)}")
    if status.evaluation is not None:
        lines.append(f"  evaluated  {evaluated_line(status.evaluation)}")
    return lines + _present(status)


def seconds_line(status: JobStatus) -> str:
    """The seconds of a job: `4.5 queued, of which 3.9 importing torch, 0.1 loading the model; 0.5 running`."""
    usage = status.usage
    waits = ((usage.torch_wait_seconds, "importing torch"), (usage.model_wait_seconds, "loading the model"))
    waited = ", ".join(f"{seconds:.1f} {what}" for seconds, what in waits if round(seconds, 1))
    queued = f"{usage.queued_seconds:.1f} queued" + (f", of which {waited}" if waited else "")
    return f"{queued}; {usage.running_seconds:.1f} running"


def _work_lines(status: JobStatus) -> list[str]:
    counts, memory = status.job.counts, status.usage.memory
    return [
        f"  tokens     {counts.prompt_tokens:,} prompt, {counts.completion_tokens:,} completion",
        *([_speed_line(status)] if counts.succeeded else []),
        f"  seconds    {seconds_line(status)}",
        *([_memory_line(memory)] if memory.is_known else []),
        *(f"  {title:<9}  {line}" for title, line in memory_lines(memory)),
    ]


def _speed_line(status: JobStatus) -> str:
    return (
        f"  speed      {status.rate:,.1f} requests/s{_speed_now(status)},"
        f" {status.per_second(status.job.counts.completion_tokens):,.1f} completion tokens/s"
    )


def _memory_line(memory: Memory) -> str:
    return (
        f"  memory     {size(memory.weights_bytes)} weights,"
        f" peak {size(memory.peak_allocated_bytes)} allocated,"
        f" {size(memory.peak_reserved_bytes)} reserved"
        f" of {size(memory.device_total_bytes)}"
    )


def _present(status: JobStatus) -> list[str]:
    if status.job.closed:
        return []
    lines = [f"  at work    {each.name} on {each.host}, {each.device}" for each in status.workers]
    lines += [f"  waiting    worker {each.name} is {loading_line(each)}" for each in status.loading]
    if status.ends_in:
        lines.append(f"  ends in    {status.ends_in}")
    return lines + [f"  waiting    {line}" for line in missing_lines(status)]


def _speed_now(status: JobStatus) -> str:
    recent = status.usage.recent_requests_per_second
    return f" ({recent:,.1f} in the last minute)" if status.job.state is JobState.RUNNING and recent else ""


def _pairs(values: Any) -> str:
    """Options for people; one with a structure of its own is JSON, cut short."""
    shown = {key: json.dumps(each) if isinstance(each, list | dict) else each for key, each in values.items()}
    return ", ".join(one_line(f"{key} {each}") for key, each in shown.items())
