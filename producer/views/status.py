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
#: For so long a worker whose process lives here may be silent, as behind a locked store, before it is given up.
_SILENT_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class JobStatus:
    """One job, its effort, who works on it, and who could. `missing_seconds`: since when nobody serves its model, which
    nobody ever did where `is_never_served`.

    `others`: live workers of its ModelSpec that hold another model than it was begun with, where there are no more.
    `given_up`: where nobody serves it, the workers that are sick or could not load it. `lacks`: adapters of its
    pending batches that nobody holds. `meant`: the known model that its name resembles, where that is likely a slip.
    `loading`: who could take it, where they are all still loading. `restarting`: where nobody serves it, the worker of
    a mill here whose process has just ended, which the mill starts again. `silent`: likewise, a worker here that was
    not heard of lately, and whose process lives. `is_starting`: likewise, the mill here is yet to start its worker.
    `evaluation`: what its ModelSpec was last measured to cost, on any text. `estimate`: when it ends, None where nobody
    works on it, or nothing tells yet.
    """

    job: Job
    effort: Usage
    workers: tuple[WorkerRow, ...]
    missing_seconds: float | None
    given_up: tuple[SeenWorker, ...] = ()
    lacks: tuple[MissingAdapter, ...] = ()
    evaluation: EvaluationRow | None = None
    estimate: Estimate | None = None
    others: tuple[WorkerRow, ...] = ()
    settings: Settings = field(default_factory=Settings)
    meant: str | None = None
    loading: tuple[WorkerRow, ...] = ()
    restarting: WorkerRow | None = None
    silent: WorkerRow | None = None
    is_starting: bool = False
    is_never_served: bool = False

    @classmethod
    def read(cls, store: Store, job_id: str, settings: Settings | None = None) -> JobStatus:
        """`settings`: those that a worker here would be started with, by default those of the process."""
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
        effort = store.usage.of(job.id)
        ends = _estimate(store, job, effort, at_work)
        mine = settings or load_settings()
        meant = None if missing is None else meant_instead(job.spec, served=store.workers.models())
        loading = () if job.closed or not all(each.is_loading for each in serving) else tuple(serving)
        last = None if missing is None else _last_here(store, job)
        silent = last if last is not None and _is_silent(last) else None
        restarting = _restarting(last, mine) if silent is None else None
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
        """Without refused prompts, which took no work."""
        return self.per_second(sum(each.prompt_tokens for each in self.effort.paces))

    def per_second(self, count: int) -> float:
        """A count over the seconds in which at least one run was worked on."""
        return count / self.effort.running_seconds if self.effort.running_seconds else 0.0

    @property
    def ends_in(self) -> str:
        """When it ends, for people: `measuring` while nothing tells, and empty where nobody works on it."""
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


def _estimate(store: Store, job: Job, effort: Usage, at_work: Sequence[WorkerRow]) -> Estimate | None:
    """When a job ends, by a sample of its requests and what its workers did; a request takes a row a choice."""
    if job.state is not JobState.RUNNING or not at_work:
        return None
    sampling = job.sampling or {}
    choices = sampling.get("n") or 1
    rows = {each.id: max(1, (each.engine_rows or 1) // choices) for each in at_work}
    begun = min(job.counts.total, job.counts.total - job.counts.pending + sum(rows.values()))
    sample = store.samples.of(job.id, total=job.counts.total, begun=begun, choices=choices)
    return estimate(job.counts, effort.paces, sample, rows=rows, max_tokens=choices * (sampling.get("max_tokens") or 1))
