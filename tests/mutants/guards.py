"""The guards that keep the invariants, each with the edit that takes it away and the tests that have to notice.

Data alone. An edit's text has to stand in its file exactly once; one that is found no more fails the run, so that
nobody moves a guard and leaves its mutant behind.
"""

from __future__ import annotations

from dataclasses import dataclass

_RACES = "tests/test_races.py"
_HISTORIES = "tests/test_state_machine.py"
_ADAPTERS = "tests/test_adapters_store.py"


@dataclass(frozen=True, slots=True)
class Edit:
    """One text of one file, and what stands there instead."""

    file: str
    old: str
    new: str


@dataclass(frozen=True, slots=True)
class Mutant:
    """A mill without one guard. `tests`: arguments of pytest, each run until one of them is red."""

    guard: str
    edits: tuple[Edit, ...]
    tests: tuple[str, ...]


_NO_FENCE = Edit(
    "jobs/store/saving.py",
    "mine = [each for each in held if fences.get(each.lease.batch_id) == each.lease.fence]",
    "mine = [each for each in held if each.lease.batch_id in fences]",
)
_LAST_OUTPUT_WINS = Edit(
    "jobs/store/saving.py",
    ".values(finished_at=self._database.now).on_conflict_do_nothing()\n",
    ".values(finished_at=self._database.now)\n"
    "        statement = statement.on_conflict_do_update(\n"
    "            index_elements=['job_id', 'index'], set_={'choices': statement.excluded.choices}\n"
    "        )\n",
)

MUTANTS: tuple[Mutant, ...] = (
    Mutant("the fence in a turn", (_NO_FENCE,), ("tests/test_store.py", _HISTORIES)),
    Mutant("the fence in a turn (races)", (_NO_FENCE,), (_RACES,)),
    Mutant("an output is inserted once", (_LAST_OUTPUT_WINS,), ("tests/test_store.py",)),
    Mutant("fence and insert once together", (_NO_FENCE, _LAST_OUTPUT_WINS), ("tests/test_store.py", _HISTORIES)),
    Mutant(
        "a turn locks its batches",
        (
            Edit(
                "jobs/store/saving.py",
                "            .where(batches.c.id.in_(ids), batches.c.state == BatchState.LEASED.value)\n"
                "            .order_by(batches.c.id)\n"
                "            .with_for_update(key_share=True)\n",
                "            .where(batches.c.id.in_(ids), batches.c.state == BatchState.LEASED.value)\n"
                "            .order_by(batches.c.id)\n",
            ),
        ),
        (f"{_RACES}::TestReaping",),
    ),
    Mutant(
        "the job's row is locked before it is closed",
        (
            Edit(
                "jobs/store/closing.py",
                "select(jobs.c.state).where(jobs.c.id == job_id).with_for_update(key_share=True))\n        ends",
                "select(jobs.c.state).where(jobs.c.id == job_id))\n        ends",
            ),
        ),
        (f"{_RACES}::TestFinishing",),
    ),
    Mutant(
        "BEGIN IMMEDIATE",
        (Edit("jobs/store/database.py", '"BEGIN IMMEDIATE" if writes else "BEGIN"', '"BEGIN"'),),
        (_RACES,),
    ),
    Mutant(
        "a claim locks the batch it takes",
        (
            Edit(
                "jobs/store/claiming.py",
                "first.with_for_update(skip_locked=True, key_share=True)",
                "first",
            ),
        ),
        (f"{_RACES}::TestClaiming",),
    ),
    Mutant(
        "who takes back locks the batches",
        (
            Edit(
                "jobs/store/recovery.py",
                "                .limit(_PAGE)\n                .with_for_update(key_share=True)\n",
                "                .limit(_PAGE)\n",
            ),
        ),
        (f"{_RACES}::TestReaping",),
    ),
    Mutant(
        "the reconciler takes expired leases back",
        (
            Edit(
                "worker/reconciler.py",
                "return self._store.recovery.reap(due) if due else 0",
                "return 0",
            ),
        ),
        (_HISTORIES,),
    ),
    Mutant(
        "two sightings before a lease is taken back",
        (Edit("worker/reconciler.py", "if now - seen[batch_id][1] >= self._apart_seconds:", "if True:"),),
        ("tests/test_reconciler.py",),
    ),
    Mutant(
        "a lease renewed since is not taken back",
        (
            Edit(
                "jobs/store/recovery.py",
                "batches.c.fence == fence, batches.c.lease_until == lease_until)",
                "batches.c.fence == fence)",
            ),
        ),
        (f"{_RACES}::TestReaping", "tests/test_store.py"),
    ),
    Mutant(
        "only dead children lose their leases",
        (Edit("jobs/store/recovery.py", "batches.c.worker_generation <= generation)", "True)"),),
        (_HISTORIES,),
    ),
    Mutant(
        "what an unanswered turn brought is handed back",
        (Edit("jobs/store/saving.py", "            if resumed:\n", "            if False:\n"),),
        (_HISTORIES,),
    ),
    Mutant(
        "the parent takes back what its child held",
        (
            Edit(
                "worker/keeper.py",
                "taken = self._leftovers.settle(self._worker_id, generation, outcome=outcome)",
                "taken = 0",
            ),
        ),
        ("tests/faults/test_poison.py::test_a_prompt_that_hangs_is_found_by_the_watchdog",),
    ),
    Mutant(
        "the spool is saved before leases are taken back",
        (
            Edit(
                "worker/leftovers.py",
                "in spools(self._settings.home, self._settings.database, worker_id, generation=generation):",
                "in ():",
            ),
        ),
        ("tests/test_spool.py",),
    ),
    Mutant(
        "crashes are counted",
        (Edit("jobs/store/blame.py", "            crashes=batch.crashes + 1,\n", "            crashes=1,\n"),),
        (_HISTORIES,),
    ),
    Mutant(
        "suspects are told from the rest",
        (Edit("jobs/store/blame.py", "if index in in_flight]", "]"),),
        ("tests/test_blame.py",),
    ),
    Mutant(
        "suspects are claimed by who holds nothing",
        (Edit("jobs/store/claiming.py", "if found is None or (found.crashes and not alone):", "if found is None:"),),
        (_HISTORIES,),
    ),
    Mutant(
        "nothing is claimed beside suspects",
        (
            Edit(
                "jobs/store/saving.py",
                "if drain or any(each.lease.apart for each in kept):",
                "if drain:",
            ),
        ),
        (_HISTORIES,),
    ),
    Mutant(
        "suspects are in ever smaller groups",
        (Edit("jobs/store/blame.py", "batch_size=SUSPECT_GROUPS[batch.crashes],", "batch_size=SUSPECT_GROUPS[0],"),),
        (_HISTORIES,),
    ),
    Mutant(
        "a job of which the last request is poison is closed",
        (
            Edit(
                "jobs/store/recovery.py",
                "                self._closing.close_if_done(connection, job_id)\n",
                "                pass\n",
            ),
        ),
        ("tests/test_blame.py",),
    ),
    Mutant(
        "one job for an idempotency key",
        (
            Edit(
                "migrations/versions/0002_crashes_and_idempotency.py",
                '["idempotency_key"], unique=True)',
                '["idempotency_key"], unique=False)',
            ),
        ),
        (f"{_RACES}::TestOpening",),
    ),
    Mutant(
        "a worker gets what it holds alone",
        (
            Edit(
                "jobs/store/pending.py",
                "return (batches.c.state == BatchState.PENDING.value, batches.c.adapter == adapter)",
                "return (batches.c.state == BatchState.PENDING.value,)",
            ),
        ),
        (_ADAPTERS,),
    ),
    Mutant(
        "requests that move stay with their adapter",
        (
            Edit("jobs/store/retrying.py", "adapter=adapter)", 'adapter="")'),
            Edit("jobs/store/blame.py", "adapter=batch.adapter,", 'adapter="",'),
        ),
        (_ADAPTERS,),
    ),
    Mutant(
        "an adapter's name means one thing to a job",
        (
            Edit(
                "jobs/store/claiming.py",
                "settled.setdefault(each.name, each) != each:",
                "settled.setdefault(each.name, each) is None:",
            ),
        ),
        (_ADAPTERS,),
    ),
    Mutant(
        "an adapter's name means one thing to all live workers",
        (Edit("jobs/store/database.py", "if not self.is_sqlite:", "if False:"),),
        (_ADAPTERS,),
    ),
    Mutant(
        "one worker on a GPU",
        (Edit("worker/device_lock.py", "            self._lock.acquire()\n", "            pass\n"),),
        ("tests/test_device_lock.py",),
    ),
)
