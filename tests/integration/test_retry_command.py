"""`batchmill retry` as a user runs it: what it says, and that the command it names runs what it moved."""

from __future__ import annotations

import pytest
from sqlalchemy import select

from batchmill.jobs.requests.request import ErrorCode
from batchmill.jobs.store.tables import outputs
from tests.integration.conftest import Mill
from tests.unit.producer.views.test_retries import ended


@pytest.fixture
def alone(mill: Mill) -> Mill:
    """A mill whose Redis has ended, as after a `run`."""
    mill.redis.stop()
    return mill


def end_workers(mill: Mill) -> None:
    with mill.store.database.write() as connection:
        connection.exec_driver_sql("UPDATE workers SET alive_until = 0")


def said_by(mill: Mill, *words: str) -> list[str]:
    """Runs a retry and returns its lines, apart from how long a busy machine took."""
    done = mill.finished("retry", *words)
    assert (done.returncode, done.stdout) == (0, "")
    return [line for line in done.stderr.splitlines() if not line.startswith("batchmill: waiting since")]


def test_it_names_what_it_leaves_and_the_command_that_runs_the_rest(mill: Mill) -> None:
    ends = {
        0: None,
        1: ErrorCode.INVALID_RESPONSE_FORMAT,
        2: ErrorCode.OUT_OF_MEMORY,
        3: ErrorCode.CONTEXT_LENGTH_EXCEEDED,
    }
    job_id = ended(mill.store, ends, tokens=700)
    end_workers(mill)
    said = said_by(mill, job_id)
    assert said[:4] == [
        f"job {job_id}: 1 request is pending again",
        "skipped: 1 context_length_exceeded (index 3): the shortest of these prompts has 700 tokens, and no live"
        " worker holds the model",
        "skipped: 1 invalid_response_format (index 1): its line alone decides that",
        f"`batchmill retry {job_id} --all` runs these too; submit corrected lines as a new file",
    ]
    assert said[4].endswith("; start one:")
    assert said[5:] == ["batchmill up -m echo"]


def test_all_of_it_and_a_live_worker(mill: Mill) -> None:
    job_id = ended(mill.store, {0: None, 1: ErrorCode.EMPTY_PROMPT, 2: ErrorCode.EMPTY_PROMPT})
    with mill.store.database.write() as connection:
        connection.exec_driver_sql("UPDATE workers SET alive_until = alive_until + 3600")
    said = said_by(mill, job_id)
    assert said[0] == f"job {job_id}: nothing to run again"
    assert said[1].startswith("skipped: 2 empty_prompt (index 1, 2): ")
    assert len(said) == 3
    assert said_by(mill, job_id, "--all") == [
        f"job {job_id}: 2 requests are pending again",
        f"workers will pick them up; `batchmill wait {job_id}` follows",
    ]
    with mill.store.database.read() as connection:
        assert connection.scalars(select(outputs.c.state)).all() == ["succeeded"]


def test_the_command_that_is_named_runs_it(alone: Mill) -> None:
    mill, job_id = alone, ended(alone.store, dict.fromkeys(range(5), ErrorCode.OUT_OF_MEMORY))
    end_workers(mill)
    words = said_by(mill, job_id)[-1].split()
    assert words[:2] == ["batchmill", "up"]
    mill.start(*words[1:])
    mill.command("wait", job_id, "--timeout", "300")
