"""Guards of the worker: engines, models, devices, its loop and its maintenance."""

from __future__ import annotations

from tests.tools.mutants.guards import suites
from tests.tools.mutants.mutant import Edit, Mutant

WORKER: tuple[Mutant, ...] = (
    Mutant(
        "requests with a common prefix are admitted beside each other",
        (Edit("worker/engine/continuous/engine.py", "return by_beginning(requests)", "return requests"),),
        ("tests/contracts/test_engines.py",),
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
    Mutant(
        "the reconciler takes expired leases back",
        (
            Edit(
                "worker/process/maintenance/reconciler.py",
                "return self._store.recovery.reap(due) if due else 0",
                "return 0",
            ),
        ),
        (suites.HISTORIES,),
    ),
    Mutant(
        "two sightings before a lease is taken back",
        (Edit("worker/process/maintenance/reconciler.py", " if now - since >= self._apart_seconds}", "}"),),
        ("tests/unit/worker/process/maintenance/test_reconciler.py",),
    ),
    Mutant(
        "spools are named by the store's own id",
        (Edit("worker/loop/spool.py", 'f"{self._store_id}-{worker_id}', 'f"{self._older}-{worker_id}'),),
        ("tests/unit/worker/loop/test_spool.py",),
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
        "logits that are no numbers are no answer (continuous)",
        (Edit("worker/engine/continuous/execution/executor.py", ".masked_fill(~sampled.sound, _NO_TOKEN)", ""),),
        (suites.NUMBERS,),
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
        (suites.NUMBERS,),
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
                "worker/engine/continuous/attention/cache.py", "self._slot(each, target)[:, :, tokens:].zero_()", "pass"
            ),
        ),
        (suites.NUMBERS,),
    ),
    Mutant(
        "a beginning is copied from a row that was answered by numbers alone",
        (Edit("worker/engine/continuous/scheduling/schedule.py", " or not donor.proven", ""),),
        (suites.NUMBERS,),
    ),
    Mutant(
        "one worker on a GPU",
        (Edit("worker/devices/lock.py", 'acquire(self._lock, f"the device {self._uuid}")', "pass"),),
        ("tests/unit/worker/devices/test_lock.py",),
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
)
