"""Guards of the store's other rooms: jobs, workers, bounds and checking."""

from __future__ import annotations

from tests.tools.mutants.guards import suites
from tests.tools.mutants.mutant import Edit, Mutant

STORE: tuple[Mutant, ...] = (
    Mutant(
        "a count that its outputs do not add up to is told of",
        (Edit("jobs/store/checking.py", "batches.c[name] != summed", "batches.c[name] < summed"),),
        ("tests/contracts/store/test_checking.py::test_each_harm_is_named",),
    ),
    Mutant(
        "a worker that gave up stays so beside a new child",
        (
            Edit(
                "jobs/store/workers/registration.py",
                "state=case((workers.c.state.in_(GIVEN_UP), workers.c.state), else_=WorkerState.LOADING.value),",
                "state=case((workers.c.id < 0, workers.c.state), else_=WorkerState.LOADING.value),",
            ),
        ),
        ("tests/contracts/store/test_health.py",),
    ),
    Mutant(
        "the job's row is locked before it is closed",
        (
            Edit(
                "jobs/store/jobs/close.py",
                "select(jobs.c.state).where(jobs.c.id == job_id).with_for_update(key_share=True))\n        ends",
                "select(jobs.c.state).where(jobs.c.id == job_id))\n        ends",
            ),
        ),
        (f"{suites.RACES}::TestFinishing",),
    ),
    Mutant(
        "a submit that renewed its lease is not deleted",
        (
            Edit(
                "jobs/store/jobs/create.py",
                "and_(jobs.c.id == job_id, jobs.c.loading_until == until)",
                "jobs.c.id == job_id",
            ),
        ),
        ("tests/contracts/store/test_store.py::TestLoading::test_only_expired_loads_are_deleted_by_others",),
    ),
    Mutant(
        "a batch closes at its bytes",
        (Edit("jobs/store/bounds.py", "count >= most or total + size > PAGE_BYTES", "count >= most"),),
        ("tests/contracts/store/test_bounds.py",),
    ),
    Mutant(
        "requests that move stay with their adapter",
        (
            Edit("jobs/store/jobs/retry.py", "adapter=adapter)", 'adapter="")'),
            Edit("jobs/store/leases/blame.py", "adapter=batch.adapter,", 'adapter="",'),
        ),
        (suites.ADAPTERS,),
    ),
    Mutant(
        "a job that has an answer keeps its model",
        (Edit("jobs/store/jobs/retry.py", " and not self._is_answered(connection, job_id)", ""),),
        ("tests/unit/producer/views/test_retries.py",),
    ),
    Mutant(
        "nothing is kept for an idle worker that serves less",
        (Edit("jobs/store/workers/idle.py", "if not kinds.issubset(json.loads(row.kinds)):", "if False:"),),
        ("tests/scenarios/test_request_kinds.py::TestToyKind",),
    ),
)
