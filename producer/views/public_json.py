"""Jobs and workers as JSON for programs: public keys, which never change their meaning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from batchmill.jobs.models.adapters import Adapter
from batchmill.jobs.models.device_memory import devices_json
from batchmill.jobs.store.views.jobs import Job
from batchmill.jobs.store.views.seen_workers import SeenWorker
from batchmill.jobs.store.views.workers import WorkerRow
from batchmill.producer.views.estimate import Estimate
from batchmill.producer.views.status import JobStatus


def status_json(status: JobStatus) -> dict[str, Any]:
    """Returns a job's whole status, as `batchmill status --json` prints it."""
    job, usage, counts = status.job, status.usage, status.job.counts
    return _head(job) | {
        "tokens": {"prompt": counts.prompt_tokens, "completion": counts.completion_tokens},
        **_usage_json(status),
        **_eta_json(status.estimate),
        "workers": [worker_json(each) for each in status.workers],
        "unserved_seconds": status.missing_seconds,
        "identity": job.identity,
        "adapters": dict.fromkeys(job.options.get("adapters", ())) | adapters_json(job.adapters),
        "missing_adapters": [each.name for each in status.lacks],
        "given_up": [_given_up_json(each) for each in status.given_up],
        "options": dict(job.options),
        "sampling": None if job.sampling is None else dict(job.sampling),
        "kind": job.kind,
        "batch_size": job.batch_size,
        "runs": usage.runs,
        "file": {"name": job.file_name, "sha256": job.file_sha256},
        "command": job.command,
        "versions": dict(job.versions),
        "model_commits": list(usage.model_commits),
        "evaluation": None if status.evaluation is None else status.evaluation.to_json(),
        "queued_at": job.queued_at,
        "started_at": job.started_at,
        "finished_at": job.finished_at,
    }


def _usage_json(status: JobStatus) -> dict[str, Any]:
    """Speed, memory, energy and time."""
    usage, memory = status.usage, status.usage.memory
    return {
        "throughput": {
            "requests_per_second": status.rate,
            "prompt_tokens_per_second": status.prompt_tokens_per_second,
            "completion_tokens_per_second": status.per_second(status.job.counts.completion_tokens),
            "recent_requests_per_second": usage.recent_requests_per_second,
        },
        "vram": {
            "weights_bytes": memory.weights_bytes,
            "peak_allocated_bytes": memory.peak_allocated_bytes,
            "peak_reserved_bytes": memory.peak_reserved_bytes,
            "device_total_bytes": memory.device_total_bytes,
        },
        "devices": devices_json(memory.devices),
        "energy_joules": memory.energy_joules,
        "seconds": {
            "queued": usage.queued_seconds,
            "running": usage.running_seconds,
            "model_load": usage.model_load_seconds,
            "queued_for_torch": usage.torch_wait_seconds,
            "queued_for_model": usage.model_wait_seconds,
        },
    }


def _given_up_json(worker: SeenWorker) -> dict[str, Any]:
    return {
        "name": worker.name,
        "host": worker.host,
        "device": worker.device,
        "state": worker.state.value,
        "error": worker.error,
    }


def worker_json(worker: WorkerRow) -> dict[str, Any]:
    return {
        "name": worker.name,
        "host": worker.host,
        "pid": worker.pid,
        "state": worker.state.value,
        "alive": worker.alive,
        "batches": worker.leases,
        "model": worker.spec.model,
        "revision": worker.spec.revision,
        "quantization": worker.spec.quantization.canonical,
        "device": worker.device,
        "device_name": worker.device_name,
        "device_uuid": worker.device_uuid,
        "weights_bytes": worker.weights_bytes,
        "torch_load_seconds": worker.torch_load_seconds,
        "model_load_seconds": worker.model_load_seconds,
        "loading_seconds": worker.loading_seconds,
        "engine": worker.engine,
        "rows": worker.engine_rows,
        "context_tokens": worker.context_tokens,
        "cache_tokens": worker.cache_tokens,
        "devices": devices_json(worker.devices),
        "identity": worker.identity,
        "adapters": adapters_json(worker.adapters),
        "uptime_seconds": worker.uptime_seconds,
        "seen_seconds": worker.seen_seconds,
        "error": worker.error,
    }


def job_json(job: Job, ends: Estimate | None = None) -> dict[str, Any]:
    """The short form of `batchmill jobs --json`."""
    return _head(job) | {
        **_eta_json(ends),
        "file": job.file_name,
        "queued_at": job.queued_at,
        "finished_at": job.finished_at,
    }


def _head(job: Job) -> dict[str, Any]:
    """The keys that every JSON of a job begins with."""
    counts, reasons = job.counts, job.counts.finish_reasons
    return {
        "id": job.id,
        "name": job.name,
        "state": job.state.value,
        "model": job.spec.model,
        "revision": job.spec.revision,
        "quantization": job.spec.quantization.canonical,
        "counts": {
            "total": counts.total,
            "succeeded": counts.succeeded,
            "failed": counts.failed,
            "cancelled": counts.cancelled,
            "pending": counts.pending,
        },
        "finish_reasons": None if reasons is None else {"stop": reasons.stop, "length": reasons.length},
    }


def _eta_json(ends: Estimate | None) -> dict[str, Any]:
    return {
        "eta_seconds": None if ends is None else ends.seconds,
        "eta_low_seconds": None if ends is None else ends.low_seconds,
        "eta_high_seconds": None if ends is None else ends.high_seconds,
        "looks_sorted": None if ends is None else ends.looks_sorted,
    }


def adapters_json(adapters: Sequence[Adapter]) -> dict[str, Any]:
    """`{name: {"path": ..., "revision": ..., "identity": ...}}`"""
    return {each.name: {"path": each.path, "revision": each.revision, "identity": each.identity} for each in adapters}
