"""A reader that stops reading: an open `results | less` holds up no commit, and sees what it would have seen."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.faults.conftest import FaultMill, answers, sqlite_first
from tests.integration.conftest import until
from tests.support.store.oracle import export_violations

#: Two thousand requests a second: the answers of a second are more than a pipe holds.
FAST = {"echo_step_seconds": 0.05, "engine_rows": 100}
REQUESTS = 3_000


def results_into_a_pipe(mill: FaultMill, job_id: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "batchmill", "results", job_id], stdout=subprocess.PIPE, text=True, env=mill.environ()
    )


@sqlite_first
def test_results_left_open_in_a_pager_stop_no_commit(mill: FaultMill, database_url: str) -> None:
    worker = mill.ready_worker(**FAST)
    job_id = mill.submit(REQUESTS)
    until(lambda: mill.succeeded(job_id) > 1_000, "more answers than a pipe holds")
    with results_into_a_pipe(mill, job_id) as reader:
        assert reader.stdout is not None
        first = reader.stdout.readline()
        assert json.loads(first)["index"] == 0
        mill.wait(job_id)
        mill.check_ended(job_id, REQUESTS)
        assert reader.poll() is None, "it still has something to write"
        rest = reader.stdout.readlines()
    assert reader.returncode == 0
    indexes = [json.loads(line)["index"] for line in (first, *rest)]
    assert indexes == list(range(REQUESTS)), "what came meanwhile is on its later pages"
    assert export_violations([first, *rest], texts=answers(REQUESTS)) == []
    assert worker.poll() is None
    assert mill.repeated() == 0


@pytest.mark.slow
def test_a_reader_that_is_killed_half_way_leaves_nothing_locked(mill: FaultMill) -> None:
    mill.ready_worker()
    job_id = mill.submit(REQUESTS)
    mill.wait(job_id)
    with results_into_a_pipe(mill, job_id) as reader:
        assert reader.stdout is not None
        reader.stdout.readline()
        reader.kill()
    other = mill.submit(100)
    mill.wait(other)
    mill.check_ended(other, 100)
