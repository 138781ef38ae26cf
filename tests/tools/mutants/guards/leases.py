"""Guards of the leases: fences, claims, turns, blame and recovery."""

from __future__ import annotations

from tests.tools.mutants.guards import suites
from tests.tools.mutants.mutant import Edit, Mutant

_NO_FENCE = Edit(
    "jobs/store/leases/sync.py",
    "mine = [each for each in reports if fences.get(each.lease.batch_id) == each.lease.fence]",
    "mine = [each for each in reports if each.lease.batch_id in fences]",
)
_LAST_OUTPUT_WINS = Edit(
    "jobs/store/leases/sync.py",
    ".values(finished_at=self._database.now).on_conflict_do_nothing()\n",
    ".values(finished_at=self._database.now)\n"
    "        statement = statement.on_conflict_do_update(\n"
    "            index_elements=['job_id', 'index'], set_={'payload': statement.excluded.payload}\n"
    "        )\n",
)

LEASES: tuple[Mutant, ...] = (
    Mutant(
        "a look after orphans reads leased batches alone",
        (
            Edit(
                "jobs/store/leases/recovery.py",
                "select(batches.c.worker_id).where(batches.c.worker_id.is_not(None))",
                "select(batches.c.worker_id)",
            ),
        ),
        ("tests/contracts/store/test_query_plans.py",),
    ),
    Mutant(
        "a crash reads the runs that crashed alone",
        (
            Edit(
                "jobs/store/leases/health.py",
                """_CRASHED = text(f"runs.outcome = '{RunOutcome.CRASHED.value}'")""",
                "_CRASHED = runs.c.outcome == RunOutcome.CRASHED.value",
            ),
        ),
        ("tests/contracts/store/test_query_plans.py",),
    ),
    Mutant("the fence in a turn", (_NO_FENCE,), (suites.STORE, suites.HISTORIES)),
    Mutant("the fence in a turn (races)", (_NO_FENCE,), (suites.RACES,)),
    Mutant("an output is inserted once", (_LAST_OUTPUT_WINS,), (suites.STORE,)),
    Mutant(
        "fence and insert once together",
        (_NO_FENCE, _LAST_OUTPUT_WINS),
        (suites.STORE, suites.HISTORIES),
    ),
    Mutant(
        "a turn locks its batches",
        (
            Edit(
                "jobs/store/leases/sync.py",
                "            .where(batches.c.id.in_(ids), batches.c.state == BatchState.LEASED.value)\n"
                "            .order_by(batches.c.id)\n"
                "            .with_for_update(key_share=True)\n",
                "            .where(batches.c.id.in_(ids), batches.c.state == BatchState.LEASED.value)\n"
                "            .order_by(batches.c.id)\n",
            ),
        ),
        (f"{suites.RACES}::TestReaping",),
    ),
    Mutant(
        "a claim locks the batch it takes",
        (
            Edit(
                "jobs/store/leases/claim.py",
                "first.with_for_update(skip_locked=True, key_share=True)",
                "first",
            ),
        ),
        (f"{suites.RACES}::TestClaiming",),
    ),
    Mutant(
        "who takes back locks the batches",
        (
            Edit(
                "jobs/store/leases/recovery.py",
                "                .limit(_PAGE)\n                .with_for_update(key_share=True)\n",
                "                .limit(_PAGE)\n",
            ),
        ),
        (f"{suites.RACES}::TestReaping",),
    ),
    Mutant(
        "a lease renewed since is not taken back",
        (
            Edit(
                "jobs/store/leases/recovery.py",
                "batches.c.fence == fence, batches.c.lease_until == lease_until)",
                "batches.c.fence == fence)",
            ),
        ),
        (f"{suites.RACES}::TestReaping", suites.STORE),
    ),
    Mutant(
        "only dead children lose their leases",
        (Edit("jobs/store/leases/recovery.py", "batches.c.worker_generation <= generation)", "True)"),),
        (suites.HISTORIES,),
    ),
    Mutant(
        "what an unanswered turn brought is handed back",
        (Edit("jobs/store/leases/sync.py", "            if resumed:\n", "            if False:\n"),),
        (
            "tests/contracts/store/test_store.py::TestClaiming::test_what_a_turn_without_an_answer_brought_is_handed_back",
        ),
    ),
    Mutant(
        "an expired lease is no crash",
        (
            Edit(
                "jobs/store/leases/recovery.py",
                "if outcome is not RunOutcome.CRASHED:",
                "if outcome is RunOutcome.RELEASED:",
            ),
        ),
        ("tests/contracts/store/test_blame.py::test_a_release_and_an_expired_lease_are_no_crashes",),
    ),
    Mutant(
        "crashes are counted",
        (Edit("jobs/store/leases/blame.py", "            crashes=batch.crashes + 1,\n", "            crashes=1,\n"),),
        (suites.HISTORIES,),
    ),
    Mutant(
        "suspects are told from the rest",
        (Edit("jobs/store/leases/blame.py", "if index in in_flight}", "}"),),
        ("tests/contracts/store/test_blame.py",),
    ),
    Mutant(
        "suspects are claimed by who holds nothing",
        (Edit("jobs/store/leases/claim.py", "if best is None or (best.crashes and not alone):", "if best is None:"),),
        (suites.HISTORIES,),
    ),
    Mutant(
        "nothing is claimed beside suspects",
        (
            Edit(
                "jobs/store/leases/sync.py",
                "if drain or any(each.lease.apart for each in kept):",
                "if drain:",
            ),
        ),
        (suites.HISTORIES,),
    ),
    Mutant(
        "suspects are in ever smaller groups",
        (
            Edit(
                "jobs/store/leases/blame.py",
                "batch_size=SUSPECT_GROUPS[batch.crashes],",
                "batch_size=SUSPECT_GROUPS[0],",
            ),
        ),
        (suites.HISTORIES,),
    ),
    Mutant(
        "a job of which the last request is poison is closed",
        (
            Edit(
                "jobs/store/leases/recovery.py",
                "                self._closing.close_if_done(connection, job_id)\n",
                "                pass\n",
            ),
        ),
        ("tests/contracts/store/test_blame.py",),
    ),
    Mutant(
        "a worker gets what it holds alone",
        (
            Edit(
                "jobs/store/leases/queue.py",
                "return (batches.c.state == BatchState.PENDING.value, batches.c.adapter == adapter)",
                "return (batches.c.state == BatchState.PENDING.value,)",
            ),
        ),
        (suites.ADAPTERS,),
    ),
    Mutant(
        "an adapter's name means one thing to a job",
        (
            Edit(
                "jobs/store/leases/claim.py",
                "if not mine.agrees_with(each):",
                "if mine is None:",
            ),
        ),
        (suites.ADAPTERS,),
    ),
    Mutant(
        "a claim passes over jobs of another model",
        (Edit("jobs/store/leases/queue.py", "    if among.identities is not None:", "    if False:"),),
        ("tests/contracts/store/test_identities.py",),
    ),
    Mutant(
        "a job keeps the model that began it",
        (Edit("jobs/store/leases/claim.py", "elif row.identity != session.identity:", "elif False:"),),
        ("tests/contracts/store/test_identities.py::TestClaiming",),
    ),
    Mutant(
        "a model whose files have changed begins no job",
        (Edit("jobs/store/leases/queue.py", "settled if among.begun else", "settled if False else"),),
        ("tests/contracts/store/test_identities.py::TestClaiming",),
    ),
    Mutant(
        "a worker takes the kinds of requests that its engine serves",
        (Edit("jobs/store/leases/queue.py", "    chosen = chosen.where(jobs.c.kind.in_(sorted(among.kinds)))\n", ""),),
        ("tests/scenarios/test_request_kinds.py::TestToyKind",),
    ),
)
