"""Guards of `jobs` outside the store: processes, files, settings, the broker and requests."""

from __future__ import annotations

from tests.tools.mutants.mutant import Edit, Mutant

JOBS: tuple[Mutant, ...] = (
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
        "each store has queues of its own",
        (Edit("jobs/broker/queue_name.py", 'f"{store_id} {spec.canonical}"', "spec.canonical"),),
        ("tests/unit/jobs/broker/test_queue_name.py",),
    ),
    Mutant(
        "a child whose parent was gone before it asked to end with it",
        (Edit("jobs/runtime/process/parent_death.py", "if os.getppid() != parent_pid:", "if False:"),),
        ("tests/unit/worker/process/test_child.py::TestBeginning::test_whose_parent_is_gone_by_then_ends_at_once",),
    ),
    Mutant(
        "an output over its input is refused",
        (Edit("jobs/runtime/files/output_file.py", "return os.path.samestat(target_status, status)", "return False"),),
        ("tests/unit/jobs/runtime/files/test_output_file.py",),
    ),
    Mutant(
        "a retry leaves alone what a line alone decides",
        (Edit("jobs/requests/causes.py", "                return False\n", "                return True\n"),),
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
        "Celery's own variables are taken away",
        (Edit("jobs/runtime/process/isolation.py", '("CELERY_", ', "("),),
        ("tests/unit/jobs/runtime/process/test_isolation.py",),
    ),
)
