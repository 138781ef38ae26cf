"""The embedded store's file deleted or replaced under a live worker: it ends with one line, and nobody begins anew."""

from __future__ import annotations

import shutil
import signal

from tests.faults.conftest import SLOW, FaultMill
from tests.integration.conftest import PATIENCE_SECONDS, until


def test_a_worker_whose_store_is_deleted_ends_and_no_command_makes_an_empty_one(mill: FaultMill) -> None:
    worker = mill.ready_worker(**SLOW)
    second = mill.ready_worker("--name", "stopped")
    job_id = mill.submit(300)
    until(lambda: mill.succeeded(job_id) > 20, "some answers")
    kept = mill.home / "kept.db"
    for each in (worker, second):  # or they may have noticed, and ended, before the command looks
        each.send_signal(signal.SIGSTOP)
    (mill.home / "batchmill.db").rename(kept)
    done = mill.finished("status")
    assert done.returncode == 1
    assert "is gone, and a worker, `run` or `up` is still at work on it" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (mill.home / "batchmill.db").exists()
    for each in (worker, second):
        each.send_signal(signal.SIGCONT)
    for each in (worker, second):
        assert each.wait(PATIENCE_SECONDS) == 1
        assert "was deleted or replaced while this process used it" in mill.log_of(each).splitlines()[-1]
        assert "Traceback" not in mill.log_of(each)
    kept.rename(mill.home / "batchmill.db")
    mill.store.close()
    mill.ready_worker()
    mill.wait(job_id)
    mill.check_ended(job_id, 300)


def test_a_worker_whose_store_is_another_file_ends_and_the_next_one_works_on_that(mill: FaultMill) -> None:
    worker = mill.ready_worker(**SLOW)
    job_id = mill.submit(300)
    until(lambda: mill.succeeded(job_id) > 20, "some answers")
    mill.command("db", "current")
    copy = mill.home / "copy.db"
    shutil.copy(mill.home / "batchmill.db", copy)  # as whoever restores a backup does
    copy.rename(mill.home / "batchmill.db")
    mill.store.close()
    assert worker.wait(PATIENCE_SECONDS) == 1
    assert "was deleted or replaced" in mill.log_of(worker).splitlines()[-1]
    mill.ready_worker()
    mill.wait(job_id)


def test_without_a_live_worker_a_new_store_is_made(mill: FaultMill) -> None:
    mill.store.close()
    (mill.home / "batchmill.db").unlink()
    assert mill.finished("jobs").returncode == 0
    assert (mill.home / "batchmill.db").exists()
