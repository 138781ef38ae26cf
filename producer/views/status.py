"""The status of one job: read, and computed."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from socket import gethostname

from batchmill.jobs.advice import mill_lives, mill_starts, start_words
from batchmill.jobs.configuration.settings import Settings, load_settings
from batchmill.jobs.models.misspellings import meant_instead
from batchmill.jobs.requests.states import JobState, WorkerState
from batchmill.jobs.runtime.process.process import Lives
from batchmill.jobs.store.store import Store
from batchmill.jobs.store.views.evaluations import EvaluationRow
from batchmill.jobs.store.views.jobs import Job
from batchmill.jobs.store.views.missing_adapters import MissingAdapter
from batchmill.jobs.store.views.seen_workers import SeenWorker
from batchmill.jobs.store.views.usage import Usage
from batchmill.jobs.store.views.workers import WorkerRow
from batchmill.jobs.store.workers.liveness import GIVEN_UP
from batchmill.producer.views.estimate import Estimate, estimate, estimated
from batchmill.producer.views.gone_workers import seen_here

#: A mill starts a worker again within a minute.
_RESTART_SECONDS = 75.0
#: The time for which a worker whose process lives here may be silent, as behind a locked store, before it is given up.
_SILENT_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class JobStatus:
    """One job, the usage that it took, the workers at it, and those that could take it.

    A job is served while a live worker holds its model, and that worker is not bound to another job.
    """

    job: Job
    usage: Usage
    #: The live workers that hold batches of it.
    workers: tuple[WorkerRow, ...]
    #: The time for which nobody has served it; None while somebody does, and once it is closed.
    missing_seconds: float | None
    #: The workers that are sick or could not load its model, where nobody serves it.
    given_up: tuple[SeenWorker, ...] = ()
    #: The adapters of its pending batches that no live worker holds.
    lacks: tuple[MissingAdapter, ...] = ()
    #: The last measurement of what its ModelSpec costs, on any text.
    evaluation: EvaluationRow | None = None
    #: The estimate of its end; None where nobody works on it, or nothing tells yet.
    estimate: Estimate | None = None
    #: The live workers of its ModelSpec, where all of them hold another model than it was begun with.
    others: tuple[WorkerRow, ...] = ()
    #: The settings that a worker here would be started with.
    settings: Settings = field(default_factory=Settings)
    #: The known model that its model's name is likely a slip of, where nobody serves it.
    meant: str | None = None
    #: The workers that could take it, where all of them are still loading.
    loading: tuple[WorkerRow, ...] = ()
    #: The worker of a mill here whose process has just ended, and which the mill starts again, where nobody serves it.
    restarting: WorkerRow | None = None
    #: A worker here that was not heard of lately, and whose process lives, where nobody serves it.
    silent: WorkerRow | None = None
    #: True where nobody serves it, and the mill here is yet to start its worker.
    is_starting: bool = False
    #: True where nobody ever served its model.
    is_never_served: bool = False

    @classmethod
    def read(cls, store: Store, job_id: str, settings: Settings | None = None) -> JobStatus:
        """Reads it from the store. `settings` are by default those of the process. Raises NotFound."""
        job = store.jobs.job(job_id)
        serving = [seen_here(each) for each in store.workers.rows(spec=job.spec)]
        serving = [each for each in serving if each.alive and each.only_job in (None, job.id)]
        at_work = [] if job.closed else [seen_here(each) for each in store.workers.rows(job_id=job.id)]
        at_work = [each for each in at_work if each.alive]
        missing = None
        given_up: tuple[SeenWorker, ...] = ()
        if not serving and not job.closed:
            missing = store.workers.unserved_seconds(job.spec, since=job.queued_at)
            given_up = store.blockers.given_up(job.spec, job_id=job.id)
        lacks = store.blockers.lacks(job.id) if job.options.get("adapters") and not job.closed else ()
        evaluation = store.evaluations.latest(job.spec, identity=job.identity)
        others = () if job.closed or any(job.is_of(each.identity) for each in serving) else tuple(serving)
        usage = store.usage.of(job.id)
        ends = _estimate(store, job, usage, at_work)
        mine = settings or load_settings()
        meant = None if missing is None else meant_instead(job.spec, served=store.workers.models())
        loading = () if job.closed or not all(each.is_loading for each in serving) else tuple(serving)
        last = None if missing is None else _last_here(store, job)
        silent = last if last is not None and _is_silent(last) else None
        restarting = _restarting(last, mine) if silent is None else None
        return cls(
            job,
            usage,
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
            silent=silent,
            is_starting=missing is not None and mill_starts(job.spec, mine, job_id=job.id),
            is_never_served=missing is not None and not store.workers.ever_served(job.spec),
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
        """Prompt tokens per second of work; refused prompts took none, and do not count."""
        return self.per_second(sum(each.prompt_tokens for each in self.usage.paces))

    def per_second(self, count: int) -> float:
        """A count over the seconds in which at least one run was worked on."""
        return count / self.usage.running_seconds if self.usage.running_seconds else 0.0

    @property
    def ends_in(self) -> str:
        """Its end, for people: `measuring` while nothing tells, and empty where nobody works on it."""
        if self.estimate is not None:
            return estimated(self.estimate)
        return "measuring" if self.workers and self.job.state is JobState.RUNNING else ""


def _last_here(store: Store, job: Job) -> WorkerRow | None:
    """The newest worker of this machine that could work on a job and is not there, unless it gave up."""
    rows = store.workers.rows(only_alive=False, spec=job.spec, seen_within_seconds=_SILENT_SECONDS)
    ended = (each for each in reversed(rows) if each.only_job in (None, job.id) and each.host == gethostname())
    newest = next(ended, None)
    return None if newest is None or newest.state in GIVEN_UP else newest


def _is_silent(worker: WorkerRow) -> bool:
    if worker.process is None or worker.state is WorkerState.STOPPED:
        return False
    return worker.process.lives() is Lives.YES


def _restarting(last: WorkerRow | None, settings: Settings) -> WorkerRow | None:
    """The last worker where it has just ended and a mill lives here, which starts it again."""
    is_recent = last is not None and last.seen_seconds < _RESTART_SECONDS
    return last if is_recent and mill_lives(settings.home) else None


def _estimate(store: Store, job: Job, usage: Usage, at_work: Sequence[WorkerRow]) -> Estimate | None:
    """Estimates a job's end by a sample of its requests and its workers' pace; each choice takes a row."""
    if job.state is not JobState.RUNNING or not at_work:
        return None
    sampling = job.sampling or {}
    choices = sampling.get("n") or 1
    rows = {each.id: max(1, (each.engine_rows or 1) // choices) for each in at_work}
    begun = min(job.counts.total, job.counts.total - job.counts.pending + sum(rows.values()))
    sample = store.samples.of(job.id, total=job.counts.total, begun=begun, choices=choices)
    return estimate(job.counts, usage.paces, sample, rows=rows, max_tokens=choices * (sampling.get("max_tokens") or 1))
