"""The public JSON of jobs and workers, pinned key by key and type by type."""

from __future__ import annotations

from typing import Any

from batchmill.jobs.store.store import Store
from batchmill.producer.views.public_json import job_json, status_json, worker_json
from batchmill.producer.views.status import JobStatus
from tests.support.json_shape import check_shape

NUMBER = (int, float)
#: The public keys of `status JSON`; none may go or change its meaning.
STATUS: dict[str, Any] = {
    "id": str,
    "name": str,
    "state": str,
    "model": str,
    "revision": type(None),
    "quantization": str,
    "counts": {"total": int, "succeeded": int, "failed": int, "cancelled": int, "pending": int},
    "finish_reasons": {"stop": int, "length": int},
    "tokens": {"prompt": int, "completion": int},
    "throughput": {
        "requests_per_second": NUMBER,
        "prompt_tokens_per_second": NUMBER,
        "completion_tokens_per_second": NUMBER,
        "recent_requests_per_second": NUMBER,
    },
    "vram": {
        "weights_bytes": int,
        "peak_allocated_bytes": int,
        "peak_reserved_bytes": int,
        "device_total_bytes": int,
    },
    "devices": list,
    "energy_joules": (*NUMBER, type(None)),
    "seconds": {
        "queued": NUMBER,
        "running": NUMBER,
        "model_load": NUMBER,
        "queued_for_torch": NUMBER,
        "queued_for_model": NUMBER,
    },
    "eta_seconds": (*NUMBER, type(None)),
    "eta_low_seconds": (*NUMBER, type(None)),
    "eta_high_seconds": (*NUMBER, type(None)),
    "looks_sorted": (bool, type(None)),
    "workers": list,
    "unserved_seconds": (*NUMBER, type(None)),
    "identity": str,
    "adapters": dict,
    "missing_adapters": list,
    "given_up": list,
    "options": dict,
    "sampling": dict,
    "kind": str,
    "batch_size": int,
    "runs": int,
    "file": {"name": str, "sha256": str},
    "command": str,
    "versions": dict,
    "model_commits": list,
    "evaluation": (dict, type(None)),
    "queued_at": NUMBER,
    "started_at": NUMBER,
    "finished_at": (*NUMBER, type(None)),
}
WORKER = {
    "name": str,
    "host": str,
    "pid": int,
    "state": str,
    "alive": bool,
    "batches": int,
    "model": str,
    "revision": type(None),
    "quantization": str,
    "device": str,
    "device_name": str,
    "device_uuid": type(None),
    "weights_bytes": int,
    "torch_load_seconds": type(None),
    "model_load_seconds": NUMBER,
    "loading_seconds": type(None),
    "engine": str,
    "rows": int,
    "context_tokens": int,
    "cache_tokens": int,
    "devices": list,
    "identity": str,
    "adapters": dict,
    "uptime_seconds": NUMBER,
    "seen_seconds": NUMBER,
    "error": type(None),
}


def test_the_json_of_a_running_job_has_the_public_keys(store: Store, half_done: str) -> None:
    status = status_json(JobStatus.read(store, half_done))
    check_shape(status, STATUS)
    check_shape(status["workers"][0], WORKER)
    assert status["counts"] == {"total": 10, "succeeded": 2, "failed": 2, "cancelled": 0, "pending": 6}
    assert status["sampling"] == {"max_tokens": 256, "temperature": 0.0, "top_k": 7}
    assert status["options"] == {"temperature": 0.0}
    assert status["throughput"]["requests_per_second"] > 0
    assert status["eta_seconds"] is None, "so few answers tell nothing"
    assert status["unserved_seconds"] is None
    assert status["given_up"] == []


def test_the_json_of_jobs_and_workers(store: Store, half_done: str) -> None:
    job = job_json(store.jobs.job(half_done))
    assert list(job) == [
        "id",
        "name",
        "state",
        "model",
        "revision",
        "quantization",
        "counts",
        "finish_reasons",
        "eta_seconds",
        "eta_low_seconds",
        "eta_high_seconds",
        "looks_sorted",
        "file",
        "queued_at",
        "finished_at",
    ]
    assert sum(count for state, count in job["counts"].items() if state != "total") == job["counts"]["total"]
    check_shape(worker_json(store.workers.rows()[0]), WORKER)
