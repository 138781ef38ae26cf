"""The guards that keep the invariants, each with the edit that takes it away and the tests that have to notice.

Data alone. An edit's text has to stand in its file exactly once; one that is found no more fails the run, so that
nobody moves a guard and leaves its mutant behind.
"""

from __future__ import annotations

from dataclasses import dataclass

_STORE = "tests/contracts/store/test_store.py"
_RACES = "tests/scenarios/test_races.py"
_HISTORIES = "tests/scenarios/test_histories.py"
_ADAPTERS = "tests/contracts/store/test_adapters.py"
_NUMBERS = "tests/contracts/test_numbers.py"


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

MUTANTS: tuple[Mutant, ...] = (
    Mutant(
        "whoever opens a SQLite store makes no file",
        (Edit("jobs/store/database/database.py", "else 'rw'}\"", "else 'rwc'}\""),),
        ("tests/unit/jobs/store/database/test_database.py",),
    ),
    Mutant(
        "a look at a SQLite store cannot write",
        (Edit("jobs/store/database/database.py", "{'ro' if self._read_only else 'rw'}", "rw"),),
        ("tests/contracts/store/test_checking.py::test_a_read_only_store_writes_nothing",),
    ),
    Mutant(
        "a look at a PostgreSQL store cannot write",
        (Edit("jobs/store/database/postgresql.py", "{_READ_ONLY if read_only else ''}", ""),),
        ("tests/contracts/store/test_checking.py::test_a_read_only_store_writes_nothing",),
    ),
    Mutant(
        "a count that its outputs do not add up to is told of",
        (Edit("jobs/store/checking.py", "batches.c[name] != summed", "batches.c[name] < summed"),),
        ("tests/contracts/store/test_checking.py::test_each_harm_is_named",),
    ),
    Mutant(
        "the victim of a deadlock begins again",
        (
            Edit(
                "jobs/store/database/conflicts.py",
                "            except StoreConflict:\n",
                "            except ZeroDivisionError:\n",
            ),
        ),
        ("tests/contracts/store/test_conflicts.py",),
    ),
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
    Mutant(
        "who waits keeps no connection to PostgreSQL",
        (Edit("jobs/store/database/postgresql.py", "_KEPT_SECONDS = 0.25\n", "_KEPT_SECONDS = 3_600.0\n"),),
        ("tests/faults/test_connections.py::test_a_store_that_is_not_used_keeps_no_connection",),
    ),
    Mutant(
        "PostgreSQL is asked for READ COMMITTED by name",
        (Edit("jobs/store/database/postgresql.py", "BEGIN ISOLATION LEVEL READ COMMITTED;", "BEGIN;"),),
        ("tests/contracts/store/test_postgresql.py",),
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
        "a writer of SQLite waits for those who came before",
        (Edit("jobs/store/database/database.py", "            with line.head():\n", "            if True:\n"),),
        ("tests/unit/jobs/store/database/test_line.py",),
    ),
    Mutant(
        "every mark of a conversation is in its prompt",
        (
            Edit(
                "worker/engine/text/chat/chat_template.py",
                "if missing is None and not marked.garbled(written):",
                "if written:",
            ),
        ),
        ("tests/unit/worker/engine/text/chat/test_chat_template.py",),
    ),
    Mutant(
        "a schema is refused where it would be broken",
        (
            Edit(
                "worker/engine/grammar/schema.py",
                'if not _is_exact_bound(keyword, each.get(keyword), of=each.get("type")):',
                "if False:",
            ),
        ),
        ("tests/unit/worker/engine/grammar/test_grammars_refused.py",),
    ),
    Mutant("the fence in a turn", (_NO_FENCE,), (_STORE, _HISTORIES)),
    Mutant("the fence in a turn (races)", (_NO_FENCE,), (_RACES,)),
    Mutant("an output is inserted once", (_LAST_OUTPUT_WINS,), (_STORE,)),
    Mutant(
        "fence and insert once together",
        (_NO_FENCE, _LAST_OUTPUT_WINS),
        (_STORE, _HISTORIES),
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
        (f"{_RACES}::TestReaping",),
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
        (f"{_RACES}::TestFinishing",),
    ),
    Mutant(
        "BEGIN IMMEDIATE",
        (Edit("jobs/store/database/database.py", 'exec_driver_sql("BEGIN IMMEDIATE")', 'exec_driver_sql("BEGIN")'),),
        (_RACES,),
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
        (f"{_RACES}::TestClaiming",),
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
        (f"{_RACES}::TestReaping",),
    ),
    Mutant(
        "the reconciler takes expired leases back",
        (
            Edit(
                "worker/process/maintenance/reconciler.py",
                "return self._store.recovery.reap(due) if due else 0",
                "return 0",
            ),
        ),
        (_HISTORIES,),
    ),
    Mutant(
        "two sightings before a lease is taken back",
        (Edit("worker/process/maintenance/reconciler.py", " if now - since >= self._apart_seconds}", "}"),),
        ("tests/unit/worker/process/maintenance/test_reconciler.py",),
    ),
    Mutant(
        "a lease further ahead than any can be is over",
        (
            Edit(
                "jobs/store/database/clock.py",
                "return or_(until < now - for_seconds, until > now + lease_seconds)",
                "return until < now - for_seconds",
            ),
        ),
        ("tests/contracts/store/test_store.py::TestRecovery::test_a_lease_further_ahead_than_any_can_be_is_over",),
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
        "a lease renewed since is not taken back",
        (
            Edit(
                "jobs/store/leases/recovery.py",
                "batches.c.fence == fence, batches.c.lease_until == lease_until)",
                "batches.c.fence == fence)",
            ),
        ),
        (f"{_RACES}::TestReaping", _STORE),
    ),
    Mutant(
        "a pid that was given out again is another process",
        (Edit("jobs/runtime/process/process.py", "start_ticks == self.start_ticks and ", ""),),
        ("tests/unit/jobs/runtime/process/test_process.py", "tests/unit/worker/loop/test_spool.py"),
    ),
    Mutant(
        "of a process in another namespace nothing is concluded",
        (Edit("jobs/runtime/process/process.py", "if place.namespace != self.namespace:", "if False:"),),
        ("tests/unit/jobs/runtime/process/test_process.py",),
    ),
    Mutant(
        "a leftover is ended only if it is this home's",
        (Edit("jobs/runtime/process/pid_file.py", " and _is_of(process, home, word)", ""),),
        ("tests/unit/jobs/runtime/process/test_pid_file.py",),
    ),
    Mutant(
        "spools are named by the store's own id",
        (Edit("worker/loop/spool.py", 'f"{self._store_id}-{worker_id}', 'f"{self._older}-{worker_id}'),),
        ("tests/unit/worker/loop/test_spool.py",),
    ),
    Mutant(
        "each store has queues of its own",
        (Edit("jobs/models/spec.py", 'f"{store_id} {self.canonical}"', "self.canonical"),),
        ("tests/unit/jobs/models/test_spec.py",),
    ),
    Mutant(
        "only dead children lose their leases",
        (Edit("jobs/store/leases/recovery.py", "batches.c.worker_generation <= generation)", "True)"),),
        (_HISTORIES,),
    ),
    Mutant(
        "what an unanswered turn brought is handed back",
        (Edit("jobs/store/leases/sync.py", "            if resumed:\n", "            if False:\n"),),
        (_HISTORIES,),
    ),
    Mutant(
        "the parent takes back what its child held",
        (
            Edit(
                "worker/process/maintenance/keeper.py",
                "taken = self._leftovers.settle(self._worker_id, generation, outcome=outcome)",
                "taken = 0",
            ),
        ),
        ("tests/faults/test_poison.py::test_a_prompt_that_hangs_is_found_by_the_watchdog",),
    ),
    Mutant(
        "a child that is stopped is not silent",
        (Edit("worker/process/maintenance/watchdog.py", "elif not _is_paused(beat.pid):", "else:"),),
        ("tests/unit/worker/process/maintenance/test_watchdog.py::test_a_process_that_was_stopped_is_not_ended",),
    ),
    Mutant(
        "a pause of the parent is no silence of its child",
        (
            Edit(
                "worker/process/maintenance/watchdog.py",
                "self._look(min(now - before, _MOST_SECONDS))",
                "self._look(now - before)",
            ),
        ),
        (
            "tests/unit/worker/process/maintenance/test_watchdog.py::test_a_look_that_comes_late_counts_no_more_than_two_ticks",
        ),
    ),
    Mutant(
        "a child whose parent was gone before it asked to end with it",
        (Edit("jobs/runtime/process/parent_death.py", "if os.getppid() != parent_pid:", "if False:"),),
        ("tests/unit/worker/process/test_child.py::TestBeginning::test_whose_parent_is_gone_by_then_ends_at_once",),
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
        "the spool is saved before leases are taken back",
        (
            Edit(
                "worker/process/maintenance/leftovers.py",
                "in self._spools.left_by(worker_id, generation=generation):",
                "in ():",
            ),
        ),
        ("tests/unit/worker/loop/test_spool.py",),
    ),
    Mutant(
        "crashes are counted",
        (Edit("jobs/store/leases/blame.py", "            crashes=batch.crashes + 1,\n", "            crashes=1,\n"),),
        (_HISTORIES,),
    ),
    Mutant(
        "a batch closes at its bytes",
        (Edit("jobs/store/bounds.py", "count >= most or total + size > PAGE_BYTES", "count >= most"),),
        ("tests/contracts/store/test_bounds.py",),
    ),
    Mutant(
        "an output over its input is refused",
        (Edit("jobs/runtime/files/output_file.py", "return os.path.samestat(target_status, status)", "return False"),),
        ("tests/unit/jobs/runtime/files/test_output_file.py",),
    ),
    Mutant(
        "suspects are told from the rest",
        (Edit("jobs/store/leases/blame.py", "if index in in_flight}", "}"),),
        ("tests/contracts/store/test_blame.py",),
    ),
    Mutant(
        "suspects are claimed by who holds nothing",
        (Edit("jobs/store/leases/claim.py", "if best is None or (best.crashes and not alone):", "if best is None:"),),
        (_HISTORIES,),
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
        (_HISTORIES,),
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
        (_HISTORIES,),
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
                "jobs/store/leases/queue.py",
                "return (batches.c.state == BatchState.PENDING.value, batches.c.adapter == adapter)",
                "return (batches.c.state == BatchState.PENDING.value,)",
            ),
        ),
        (_ADAPTERS,),
    ),
    Mutant(
        "requests that move stay with their adapter",
        (
            Edit("jobs/store/jobs/retry.py", "adapter=adapter)", 'adapter="")'),
            Edit("jobs/store/leases/blame.py", "adapter=batch.adapter,", 'adapter="",'),
        ),
        (_ADAPTERS,),
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
        (_ADAPTERS,),
    ),
    Mutant(
        "an adapter's name means one thing to all live workers",
        (Edit("jobs/store/database/database.py", "if not self.is_sqlite:", "if False:"),),
        (_ADAPTERS,),
    ),
    Mutant(
        "logits that are no numbers are no answer (continuous)",
        (Edit("worker/engine/continuous/execution/executor.py", ".masked_fill(~sampled.sound, _NO_TOKEN)", ""),),
        (_NUMBERS,),
    ),
    Mutant(
        "logits that are no numbers are no answer (generate)",
        (
            Edit(
                "worker/engine/text/stopping.py",
                "(self.counts == 0) & ~self._sound",
                "(self.counts == 0) & self.failed",
            ),
        ),
        (_NUMBERS,),
    ),
    Mutant(
        "a longrope model's rows run with their like alone",
        (Edit("worker/engine/generate/engine.py", "if self._company(self._waiting[key]) == company", "if True"),),
        ("tests/unit/worker/engine/test_stretching.py",),
    ),
    Mutant(
        "code of a model that transformers does not know is refused",
        (
            Edit(
                "worker/models/vetting.py",
                "    if known and isinstance(content, dict):",
                "    if isinstance(content, dict):",
            ),
        ),
        ("tests/unit/worker/models/test_vetting.py",),
    ),
    Mutant(
        "a place of the cache is clean for the next row",
        (
            Edit(
                "worker/engine/continuous/execution/cache.py", "self._slot(each, target)[:, :, tokens:].zero_()", "pass"
            ),
        ),
        (_NUMBERS,),
    ),
    Mutant(
        "a beginning is copied from a row that was answered by numbers alone",
        (Edit("worker/engine/continuous/scheduling/schedule.py", " or not donor.proven", ""),),
        (_NUMBERS,),
    ),
    Mutant(
        "one worker on a GPU",
        (Edit("worker/devices/lock.py", 'acquire(self._lock, f"the device {self._uuid}")', "pass"),),
        ("tests/unit/worker/devices/test_lock.py",),
    ),
    Mutant(
        "a retry leaves alone what a line alone decides",
        (Edit("jobs/requests/causes.py", "                return False\n", "                return True\n"),),
        ("tests/unit/producer/views/test_retries.py",),
    ),
    Mutant(
        "a job that has an answer keeps its model",
        (Edit("jobs/store/jobs/retry.py", " and not self._is_answered(connection, job_id)", ""),),
        ("tests/unit/producer/views/test_retries.py",),
    ),
    Mutant(
        "batchmill.toml is the user's own",
        (Edit("jobs/configuration/settings_file.py", "            _refuse_owner(status, path)\n", ""),),
        ("tests/unit/jobs/configuration/test_settings_file.py",),
    ),
    Mutant(
        "nobody else writes batchmill.toml",
        (Edit("jobs/configuration/settings_file.py", "            _refuse_writers(status, path)\n", ""),),
        ("tests/unit/jobs/configuration/test_settings_file.py",),
    ),
    Mutant(
        "Celery imports nothing from the current folder",
        (Edit("jobs/broker/client.py", "loader=Loader, ", ""),),
        ("tests/unit/jobs/runtime/process/test_isolation.py",),
    ),
    Mutant(
        "the current folder leaves the import path",
        (Edit("src/batchmill/__main__.py", "not in relative - kept]", "not in kept - kept]"),),
        ("tests/unit/jobs/runtime/process/test_isolation.py",),
    ),
    Mutant(
        "Celery's own variables are taken away",
        (Edit("jobs/runtime/process/isolation.py", '("CELERY_", ', "("),),
        ("tests/unit/jobs/runtime/process/test_isolation.py",),
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
        "a run compares the model before it exports a finished job",
        (Edit("producer/cli/local/earlier.py", "elif self.model.identity != identity:", "elif False:"),),
        ("tests/unit/producer/cli/local/test_earlier.py",),
    ),
    Mutant(
        "what changes while it is loaded is refused",
        (Edit("worker/models/load.py", "    refuse_changed(content)\n", ""),),
        ("tests/unit/worker/models/test_load.py::test_a_file_that_is_written_while_it_is_loaded_is_refused",),
    ),
    Mutant(
        "what a model computes whose files were written is not saved",
        (Edit("worker/loop/runner.py", "if outputs and not self._is_whole():", "if False:"),),
        ("tests/scenarios/test_saver_and_runner.py::test_what_a_model_that_is_no_more_the_same_computed_is_not_saved",),
    ),
    Mutant(
        "a worker takes the kinds of requests that its engine serves",
        (Edit("jobs/store/leases/queue.py", "    chosen = chosen.where(jobs.c.kind.in_(sorted(among.kinds)))\n", ""),),
        ("tests/scenarios/test_request_kinds.py::TestToyKind",),
    ),
    Mutant(
        "nothing is kept for an idle worker that serves less",
        (Edit("jobs/store/workers/idle.py", "if not kinds.issubset(json.loads(row.kinds)):", "if False:"),),
        ("tests/scenarios/test_request_kinds.py::TestToyKind",),
    ),
    Mutant(
        "an embedded store at work is not upgraded",
        (Edit("migrations/revisions.py", "        _refuse_at_work(settings, store)\n", ""),),
        ("tests/scenarios/test_upgrade_at_work.py",),
    ),
)
