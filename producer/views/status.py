"""What there is to say about a job and about workers, as JSON for programs and as lines for people."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from socket import gethostname
from typing import Any

from batchmill.jobs.advice import mill_lives, start_words
from batchmill.jobs.configuration.settings import Settings, load_settings
from batchmill.jobs.models.adapters import Adapter
from batchmill.jobs.models.device_memory import devices_json
from batchmill.jobs.models.identity import differences
from batchmill.jobs.models.misspellings import meant_instead, slip_line
from batchmill.jobs.models.spec import ECHO
from batchmill.jobs.requests.states import JobState, WorkerState
from batchmill.jobs.runtime.counted import counted
from batchmill.jobs.runtime.process.process import Lives
from batchmill.jobs.runtime.sizes import size
from batchmill.jobs.store.store import Store
from batchmill.jobs.store.views.blockers import Seen
from batchmill.jobs.store.views.evaluations import EvaluationRow
from batchmill.jobs.store.views.jobs import Job
from batchmill.jobs.store.views.missing_adapters import Lack
from batchmill.jobs.store.views.usage import Effort
from batchmill.jobs.store.workers import GIVEN_UP, WorkerRow
from batchmill.producer.cli.text.device_lines import memory_lines
from batchmill.producer.cli.text.evaluated import evaluated_line
from batchmill.producer.cli.text.finish import answered_line, finish_line
from batchmill.producer.views.estimate import Estimate, estimate
from batchmill.producer.views.gone_workers import seen_here

IF_NOT_OF_UP = "if neither `up` nor `run` started it, start it yourself"
#: A mill starts a worker again within a minute.
_RESTART_SECONDS = 75.0
_MOST_REASONS = 3
_LONGEST_REASON = 300
#: Where the most is so many times the least, what lies between says nothing.
_WIDE = 4


@dataclass(frozen=True, slots=True)
class JobStatus:
    """One job, its effort, who works on it, and who could. `missing_seconds`: since when nobody serves its model.

    `others`: live workers of its ModelSpec that hold another model than it was begun with, where there are no more.
    `given_up`: where nobody serves it, the workers that are sick or could not load it. `lacks`: adapters of its
    pending batches that nobody holds. `meant`: the known model that its name resembles, where that is likely a slip.
    `loading`: who could take it, where they are all still loading. `restarting`: where nobody serves it, the worker of
    a mill here whose process has just ended, which the mill starts again.
    `evaluation`: what its ModelSpec was last measured to cost, on any text. `estimate`: when it ends, None where nobody
    works on it, or nothing tells yet.
    """

    job: Job
    effort: Effort
    workers: tuple[WorkerRow, ...]
    missing_seconds: float | None
    given_up: tuple[Seen, ...] = ()
    lacks: tuple[Lack, ...] = ()
    evaluation: EvaluationRow | None = None
    estimate: Estimate | None = None
    others: tuple[WorkerRow, ...] = ()
    settings: Settings = field(default_factory=Settings)
    meant: str | None = None
    loading: tuple[WorkerRow, ...] = ()
    restarting: WorkerRow | None = None

    @classmethod
    def read(cls, store: Store, job_id: str, settings: Settings | None = None) -> JobStatus:
        """`settings`: those that a worker here would be started with, by default those of the process."""
        job = store.reading.job(job_id)
        serving = [seen_here(each) for each in store.workers.rows(spec=job.spec)]
        serving = [each for each in serving if each.alive and each.only_job in (None, job.id)]
        at_work = [] if job.closed else [seen_here(each) for each in store.workers.rows(job_id=job.id)]
        at_work = [each for each in at_work if each.alive]
        missing = None
        given_up: tuple[Seen, ...] = ()
        if not serving and not job.closed:
            missing = store.workers.unserved_seconds(job.spec, since=job.queued_at)
            given_up = store.holders.given_up(job.spec, job_id=job.id)
        lacks = store.holders.lacks(job.id) if job.options.get("adapters") and not job.closed else ()
        evaluation = store.evaluations.latest(job.spec, identity=job.identity)
        others = () if job.closed or any(job.is_of(each.identity) for each in serving) else tuple(serving)
        effort = store.effort.of(job.id)
        ends = _estimate(store, job, effort, at_work)
        mine = settings or load_settings()
        meant = None if missing is None else meant_instead(job.spec, served=store.workers.models())
        loading = () if job.closed or not all(map(is_loading, serving)) else tuple(serving)
        restarting = _restarting(store, job, mine) if missing is not None else None
        return cls(
            job,
            effort,
            tuple(at_work),
            missing,
            given_up,
            lacks,
            evaluation,
            ends,
            others,
            mine,
            meant,
            loading,
            restarting=restarting,
        )

    @property
    def start(self) -> str:
        """The command that starts a worker for this job."""
        wanted = [each.wanted for each in self.lacks]
        return shlex.join(start_words(self.job.spec, self.settings, adapters=wanted))

    @property
    def rate(self) -> float:
        """Answered requests per second of work."""
        return self.per_second(self.job.counts.succeeded)

    @property
    def prompt_tokens_per_second(self) -> float:
        """Without refused prompts, which took no work."""
        return self.per_second(sum(each.prompt_tokens for each in self.effort.paces))

    def per_second(self, count: int) -> float:
        """A count over the seconds in which at least one run was worked on."""
        return count / self.effort.running_seconds if self.effort.running_seconds else 0.0

    @property
    def _speed_now(self) -> str:
        recent = self.effort.recent_requests_per_second
        return f" ({recent:,.1f} in the last minute)" if self.job.state is JobState.RUNNING and recent else ""

    @property
    def seconds_line(self) -> str:
        """The seconds of a job: `4.5 queued, of which 3.9 importing torch, 0.1 loading the model; 0.5 running`."""
        effort = self.effort
        waits = ((effort.torch_wait_seconds, "importing torch"), (effort.model_wait_seconds, "loading the model"))
        waited = ", ".join(f"{seconds:.1f} {what}" for seconds, what in waits if round(seconds, 1))
        queued = f"{effort.queued_seconds:.1f} queued" + (f", of which {waited}" if waited else "")
        return f"{queued}; {effort.running_seconds:.1f} running"

    @property
    def ends_in(self) -> str:
        """When it ends, for people: `measuring` while nothing tells, and empty where nobody works on it."""
        if self.estimate is not None:
            return estimated(self.estimate)
        return "measuring" if self.workers and self.job.state is JobState.RUNNING else ""

    def to_json(self) -> dict[str, Any]:
        job, effort, counts = self.job, self.effort, self.job.counts
        return _head(job) | {
            "tokens": {"prompt": counts.prompt_tokens, "completion": counts.completion_tokens},
            "throughput": {
                "requests_per_second": self.rate,
                "prompt_tokens_per_second": self.prompt_tokens_per_second,
                "completion_tokens_per_second": self.per_second(counts.completion_tokens),
                "recent_requests_per_second": effort.recent_requests_per_second,
            },
            "vram": {
                "weights_bytes": effort.memory.weights_bytes,
                "peak_allocated_bytes": effort.memory.peak_allocated_bytes,
                "peak_reserved_bytes": effort.memory.peak_reserved_bytes,
                "device_total_bytes": effort.memory.device_total_bytes,
            },
            "devices": devices_json(effort.memory.devices),
            "energy_joules": effort.memory.energy_joules,
            "seconds": {
                "queued": effort.queued_seconds,
                "running": effort.running_seconds,
                "model_load": effort.model_load_seconds,
                "queued_for_torch": effort.torch_wait_seconds,
                "queued_for_model": effort.model_wait_seconds,
            },
            **_eta_json(self.estimate),
            "workers": [worker_json(each) for each in self.workers],
            "unserved_seconds": self.missing_seconds,
            "identity": job.identity,
            "adapters": dict.fromkeys(job.options.get("adapters", ())) | adapters_json(job.adapters),
            "missing_adapters": [each.name for each in self.lacks],
            "given_up": [
                {
                    "name": each.name,
                    "host": each.host,
                    "device": each.device,
                    "state": each.state.value,
                    "error": each.error,
                }
                for each in self.given_up
            ],
            "options": dict(job.options),
            "sampling": None if job.sampling is None else dict(job.sampling),
            "batch_size": job.batch_size,
            "runs": effort.runs,
            "file": {"name": job.file_name, "sha256": job.file_sha256},
            "command": job.command,
            "versions": dict(job.versions),
            "model_commits": list(effort.model_commits),
            "evaluation": None if self.evaluation is None else self.evaluation.to_json(),
            "queued_at": job.queued_at,
            "started_at": job.started_at,
            "finished_at": job.finished_at,
        }

    def lines(self) -> list[str]:
        """The same for people, a fact a line."""
        job, effort, counts = self.job, self.effort, self.job.counts
        title = f"job {job.id}" + (f" ({job.name})" if job.name else "")
        lines = [
            f"{title}: {job.state.value}" + (f", {answered_line(job)}" if job.state is JobState.CANCELLED else ""),
            f"  model      {job.spec}",
            f"  file       {job.file_name}, submitted {utc(job.queued_at)}",
            f"  requests   {counts.total:,} = {counts.succeeded:,} succeeded + {counts.failed:,} failed"
            f" + {counts.cancelled:,} cancelled + {counts.pending:,} pending",
            *([f"  finished   {finished}"] if (finished := finish_line(job)) else []),
            *(self._work_lines() if effort.runs else [f"  seconds    {effort.queued_seconds:.1f} queued"]),
        ]
        if job.sampling:
            lines.append(f"  sampling   {_pairs(job.sampling)}")
        if declared := job.options.get("adapters"):
            meant = {each.name: each.where for each in job.adapters}
            shown = (f"{name} = {meant[name]}" if name in meant else f"{name} (not used yet)" for name in declared)
            lines.append(f"  adapters   {', '.join(shown)}")
        if self.evaluation is not None:
            lines.append(f"  evaluated  {evaluated_line(self.evaluation)}")
        return lines + self._present()

    def _work_lines(self) -> list[str]:
        counts, memory = self.job.counts, self.effort.memory
        return [
            f"  tokens     {counts.prompt_tokens:,} prompt, {counts.completion_tokens:,} completion",
            f"  speed      {self.rate:,.1f} requests/s{self._speed_now},"
            f" {self.per_second(counts.completion_tokens):,.1f} completion tokens/s",
            f"  seconds    {self.seconds_line}",
            f"  memory     {size(memory.weights_bytes)} weights,"
            f" peak {size(memory.peak_allocated_bytes)} allocated,"
            f" {size(memory.peak_reserved_bytes)} reserved"
            f" of {size(memory.device_total_bytes)}",
            *(f"  {title:<9}  {line}" for title, line in memory_lines(memory)),
        ]

    def _lacking_lines(self, start: str) -> list[str]:
        changed = any(each.changed for each in self.lacks)
        return [
            *map(lack_line, self.lacks),
            other_remedy(self.job) if changed else f"start a worker that holds it: {start}",
        ]

    def _present(self) -> list[str]:
        if self.job.closed:
            return []
        lines = [f"  at work    {each.name} on {each.host}, {each.device}" for each in self.workers]
        lines += [f"  waiting    worker {each.name} is {loading_line(each)}" for each in self.loading]
        if self.ends_in:
            lines.append(f"  ends in    {self.ends_in}")
        return lines + [f"  waiting    {line}" for line in self.missing_lines()]

    @property
    def slip_remedy(self) -> str:
        """What to do about a model's name that is likely a slip, up to the command that starts a worker for it."""
        again = f"`batchmill cancel {self.job.id}`, and submit it again with -m {shlex.quote(self.meant or '')}"
        return f"{again}; if {self.job.spec.model} is what you mean, start a worker"

    def missing_lines(self) -> list[str]:
        """Who is missing, for how long, why if it is known, and the command that helps; nothing if nobody is."""
        start = self.start
        if self.others:
            first = self.others[0]
            return [f"{other_line(self.job, first.name, first.host, first.identity)};", other_remedy(self.job)]
        if self.missing_seconds is None:
            return self._lacking_lines(start) if self.lacks else []
        if self.restarting is not None:
            return [f"{restarting_line(self.restarting)};", f"{IF_NOT_OF_UP}: {start}"]
        missing = f"no live worker has served {self.job.spec} for {duration(self.missing_seconds)}"
        if self.meant is not None:
            return [f"{missing}: {slip_line(self.job.spec, self.meant)}", f"{self.slip_remedy}:", start]
        if not self.given_up:
            return [f"{missing}; start one:", start]
        reasons = [f"{given_up_line(each)};" for each in self.given_up[:_MOST_REASONS]]
        return [f"{missing}:", *reasons, f"{advice(self.given_up[0].state)}{start}"]


def _restarting(store: Store, job: Job, settings: Settings) -> WorkerRow | None:
    """The newest worker for a job that has ended on this machine while a mill lives here, unless it gave up."""
    if not mill_lives(settings.home):
        return None
    rows = store.workers.rows(only_alive=False, spec=job.spec, seen_within_seconds=_RESTART_SECONDS)
    ended = (each for each in reversed(rows) if each.only_job in (None, job.id) and each.host == gethostname())
    newest = next(ended, None)
    return None if newest is None or newest.state in GIVEN_UP else newest


def _estimate(store: Store, job: Job, effort: Effort, at_work: Sequence[WorkerRow]) -> Estimate | None:
    """When a job ends, by a sample of its requests and what its workers did; a request takes a row a choice."""
    if job.state is not JobState.RUNNING or not at_work:
        return None
    sampling = job.sampling or {}
    choices = sampling.get("n") or 1
    rows = {each.id: max(1, (each.engine_rows or 1) // choices) for each in at_work}
    begun = min(job.counts.total, job.counts.total - job.counts.pending + sum(rows.values()))
    sample = store.sampling.of(job.id, total=job.counts.total, begun=begun)
    return estimate(job.counts, effort.paces, sample, rows=rows, max_tokens=choices * (sampling.get("max_tokens") or 1))


def restarting_line(worker: WorkerRow) -> str:
    """The worker whose process has just ended, and what becomes of it."""
    return f"worker {worker.name} has ended, and the mill here restarts it within a minute"


def lack_line(lack: Lack) -> str:
    """The adapter that nobody holds, and who holds another one by its name."""
    waiting = f"{counted(lack.batches, 'batch')} {'waits' if lack.batches == 1 else 'wait'}"
    line = f"{waiting} for the adapter {lack.name}, which no live worker holds"
    if lack.meant is None or not lack.held_otherwise:
        return line
    who, other = lack.held_otherwise[0]
    if lack.changed:
        return f"{line}: {lack.meant.where} has changed since this job used it, and worker {who} holds the new version"
    return f"{line}: this job means {lack.meant.where}, and worker {who} holds {other.where} under that name"


def other_line(job: Job, worker: str, host: str, identity: str | None) -> str:
    """The worker that serves a job's ModelSpec, and holds another model than the job was begun with."""
    changed = differences(job.identity or "", identity or "")
    return f"it was started with another model than worker {worker} on {host} holds; changed since then: {changed}"


def other_remedy(job: Job) -> str:
    """What to do about it."""
    return (
        "to finish it, restore the old model and restart a worker; to have the new one answer everything, "
        f"`batchmill cancel {job.id}` and submit the file again"
    )


def adapters_json(adapters: Sequence[Adapter]) -> dict[str, Any]:
    """`{name: {"path": ..., "revision": ..., "identity": ...}}`"""
    return {each.name: {"path": each.path, "revision": each.revision, "identity": each.identity} for each in adapters}


def given_up_line(worker: Seen) -> str:
    """Who gave up, and why."""
    what = "is sick" if worker.state is WorkerState.SICK else "could not load the model"
    why = one_line(worker.error or "no reason is known")
    return f"worker {worker.name} on {worker.host} ({worker.device}) {what}: {why}"


def advice(state: WorkerState) -> str:
    """What to do about a worker that gave up, up to the command that starts it again."""
    if state is WorkerState.SICK:
        return "check its device (the driver's log, the worker's log), then start it again: "
    return "fix that, then start it again: "


def worker_line(worker: WorkerRow) -> str:
    """One worker for people: what it holds, on which device, what it is at, and what hinders it or why it gave up."""
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
    if worker.alive and is_loading(worker):
        line += f"  {loading_line(worker)}"
    return line if worker.error is None else f"{line}  ({one_line(worker.error)})"


def is_loading(worker: WorkerRow) -> bool:
    """True for one that does not hold its model yet."""
    return worker.state in (WorkerState.STARTING, WorkerState.LOADING)


def loading_line(worker: WorkerRow) -> str:
    """What a worker that loads has spent its time on, and does since: `loading torch 4 s, the model 1 s`."""
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
    """What every JSON of a job begins with."""
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


def _eta_json(found: Estimate | None) -> dict[str, Any]:
    return {
        "eta_seconds": None if found is None else found.seconds,
        "eta_low_seconds": None if found is None else found.low_seconds,
        "eta_high_seconds": None if found is None else found.high_seconds,
        "looks_sorted": None if found is None else found.looks_sorted,
    }


def estimated(found: Estimate) -> str:
    """When a job ends, for people: `about 40 s (30 s to 1 min 10 s)`."""
    low, likely, high = map(duration, (found.low_seconds, found.seconds, found.high_seconds))
    if found.high_seconds > _WIDE * found.low_seconds and low != high:
        said = f"{low} to {high}"
    else:
        said = f"about {likely}" + (f" ({low} to {high})" if low != high else "")
    return f"{said}; the file looks sorted by length, which makes this unreliable" if found.looks_sorted else said


def duration(seconds: float) -> str:
    """Seconds for people: `42 s`, `3 min 20 s`, `2 h 5 min`, `3 d 4 h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours = minutes // 60
    return f"{hours} h {minutes % 60} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def utc(seconds: float) -> str:
    """A time of the store for people."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def one_line(text: str) -> str:
    """A reason, of however many lines, as one that is not too long."""
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST_REASON else f"{line[:_LONGEST_REASON]}..."


def _pairs(values: Any) -> str:
    """Options for people; one with a structure of its own is JSON, cut short."""
    shown = {key: json.dumps(each) if isinstance(each, list | dict) else each for key, each in values.items()}
    return ", ".join(one_line(f"{key} {each}") for key, each in shown.items())
