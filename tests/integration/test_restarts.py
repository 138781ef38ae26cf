"""A worker that starts where another died: it takes back at once what that one held, and harms nobody who lives."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import update

from batchmill.jobs.configuration.settings import load_settings
from batchmill.jobs.requests.states import JobState
from batchmill.jobs.runtime.process.process import Process
from batchmill.jobs.store.store import Store
from batchmill.jobs.store.tables import workers
from tests.integration.conftest import TIMERS, Mill, until, write_prompts

#: Nobody waits for the end of a lease of this length.
LONG_LEASES = TIMERS | {"lease_seconds": 600.0}


@pytest.fixture
def shared_mill(postgresql_url: str, tmp_path: Path) -> Iterator[Mill]:
    """A mill on PostgreSQL, as the containers of deploy/ are one, with leases that do not end here."""
    mill = Mill(tmp_path / "home", load_settings(home=tmp_path / "home", database_url=postgresql_url, **LONG_LEASES))
    mill.home.mkdir()
    mill.redis.start()
    yield mill
    mill.end()


def set_process(store: Store, process: Process | None) -> None:
    with store.database.write() as connection:
        values = {"pid": os.getpid(), "process": None if process is None else str(process)}
        connection.execute(update(workers).values(values))


def test_a_restarted_container_takes_its_batch_back_at_once(shared_mill: Mill, tmp_path: Path) -> None:
    """The host's name and the pid are those of the dead worker, and a process of that pid lives."""
    mill = shared_mill
    first = mill.start("worker", "-m", "echo", echo_step_seconds=0.1, engine_rows=10)
    job_id = mill.command("submit", write_prompts(tmp_path / "p.jsonl", 300), "-m", "echo").strip()
    until(lambda: mill.succeeded(job_id) > 10, "some answers")
    first.kill()
    first.wait()
    mine = Process.own()
    assert mine is not None
    set_process(mill.store, replace(mine, start_ticks=mine.start_ticks - 1))
    mill.start("worker", "-m", "echo")
    until(lambda: mill.store.jobs.job(job_id).state is JobState.COMPLETED, "the job is done")
    assert mill.succeeded(job_id) == 300
