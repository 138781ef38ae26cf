"""The line about one worker, for people."""

from __future__ import annotations

from batchmill.jobs.models.spec import ECHO
from batchmill.jobs.requests.states import WorkerState
from batchmill.jobs.runtime.counted import counted
from batchmill.jobs.runtime.one_line import one_line
from batchmill.jobs.runtime.process.process import Lives
from batchmill.jobs.runtime.sizes import size
from batchmill.jobs.runtime.times import duration
from batchmill.jobs.store.views.workers import WorkerRow
from batchmill.jobs.store.workers.liveness import GIVEN_UP


def worker_line(worker: WorkerRow) -> str:
    """One worker for people: its state, model and device, its limits, and what hinders it or why it gave up."""
    ended = worker.state in (WorkerState.STOPPED, *GIVEN_UP)
    silent = worker.process is not None and worker.process.lives() is Lives.YES
    state = worker.state.value if worker.alive or ended else "silent" if silent else "dead"
    at = f", {counted(worker.leases, 'batch')}" if worker.leases else ""
    weights = f"  {size(worker.weights_bytes)} weights" if worker.weights_bytes else ""
    line = (
        f"{worker.name}  {state}{at}  {worker.spec}  {worker.device_name or worker.device} on {worker.host}"
        f"{weights}{_limits(worker)}{_adapters(worker)}"
        f"  up {duration(worker.uptime_seconds)}"
    )
    if worker.alive and worker.is_loading:
        line += f"  {loading_line(worker)}"
    return line if worker.error is None else f"{line}  ({one_line(worker.error)})"


def loading_line(worker: WorkerRow) -> str:
    """The time that a loading worker has spent on each phase so far: `loading torch 4 s, the model 1 s`."""
    torch_seconds, seconds = worker.torch_load_seconds, worker.loading_seconds
    if seconds is None and worker.generation:
        return "restarting, since its process died"
    if seconds is None:
        return f"starting, for {duration(worker.uptime_seconds)}"
    if worker.spec.model == ECHO:
        return f"loading, for {duration(seconds)}"
    if torch_seconds is None:
        return f"loading torch {duration(seconds)}"
    model = f"the model {duration(max(0.0, seconds - torch_seconds))}"
    return f"loading torch {duration(torch_seconds)}, {model}" if round(torch_seconds) else f"loading {model}"


def _adapters(worker: WorkerRow) -> str:
    return "  adapters: " + ", ".join(map(str, worker.adapters)) if worker.adapters else ""


def _limits(worker: WorkerRow) -> str:
    """The worker's engine and what it takes at once; nothing before the model is loaded."""
    if worker.engine is None:
        return ""
    limits = ((worker.engine_rows, "rows"), (worker.context_tokens, "context"), (worker.cache_tokens, "cache tokens"))
    return f"  {worker.engine}: " + ", ".join(f"{number:,} {what}" for number, what in limits if number is not None)
