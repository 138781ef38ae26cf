"""`db check`: a sound store has nothing wrong, each harm is named, and nothing is written, on either database."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import text

from batchmill.jobs.errors import StoreError
from batchmill.jobs.requests.states import JobState
from batchmill.jobs.store.checking import MOST_OF_A_KIND
from batchmill.jobs.store.store import Store
from tests.support.processes import forked
from tests.support.store import old_store
from tests.support.store.harm import sound, without_constraints
from tests.support.store.mill import load


def said(store: Store) -> list[str]:
    checking = store.checking
    return [f"{finding.check}: {finding.text}" for finding in checking.findings(checking.job_ids())]


#: Statements that break a sound store, by the finding that tells it.
CASES = {
    "rows: requests has rows of job nobody's, which is gone": "UPDATE requests SET job_id = 'nobody''s'"
    ' WHERE batch_id = 5 AND "index" = 9',
    "rows: batches has rows of job nobody's, which is gone": "UPDATE batches SET job_id = 'nobody''s' WHERE id = 5",
    "rows: request 9 is in batch 1, which this job does not have": "UPDATE requests SET batch_id = 1"
    ' WHERE batch_id = 5 AND "index" = 9',
    "rows: output 3 answers no request": 'DELETE FROM requests WHERE batch_id = 1 AND "index" = 3',
    "rows: run 3 is of batch 1, which this job does not have": "UPDATE runs SET batch_id = 1, fence = 9 WHERE id = 3",
    "rows: it has 11 requests, numbered from 0 to 11": 'DELETE FROM requests WHERE batch_id = 5 AND "index" = 9',
    "rows: it has 0 requests, numbered from None to None": "DELETE FROM requests WHERE batch_id IN (1, 2)",
    "counts: batch 5 counts 5 requests and has 4": "UPDATE batches SET total = 5 WHERE id = 5",
    "counts: batch 4 counts 3 succeeded, and its outputs add up to 2": "UPDATE batches SET succeeded = 3 WHERE id = 4",
    "counts: batch 4 counts 1 failed, and its outputs add up to 0": "UPDATE batches SET failed = 1 WHERE id = 4",
    "counts: batch 5 counts 1 cancelled, and its outputs add up to 0": "UPDATE batches SET cancelled = 1 WHERE id = 5",
    "counts: batch 4 counts 1 prompt tokens, and its outputs add up to 4": "UPDATE batches SET prompt_tokens = 1"
    " WHERE id = 4",
    "counts: batch 4 counts 1 completion tokens, and its outputs add up to 6": "UPDATE batches"
    " SET completion_tokens = 1 WHERE id = 4",
    "counts: batch 1 counts 4 failed, and its outputs add up to 3": "DELETE FROM outputs"
    ' WHERE run_id = 1 AND "index" = 0',
    "counts: run 4 counts 4 succeeded, and wrote 2": "UPDATE runs SET succeeded = 4 WHERE id = 4",
    "states: batch 4 is done with 2 of 4 requests answered": "UPDATE batches SET state = 'done' WHERE id = 4",
    "states: batch 3 is pending with 4 of 4 requests answered": "UPDATE batches SET state = 'pending' WHERE id = 3",
    "states: batch 4 is leased with 0 open runs": "UPDATE runs SET fence = 2 WHERE id = 4",
    "states: batch 4 is pending with 1 open runs": "UPDATE batches SET state = 'pending' WHERE id = 4",
    "states: it is completed with 2 open batches": "UPDATE jobs SET state = 'completed' WHERE state = 'running'",
    "states: it is queued with 0 open batches": "UPDATE jobs SET state = 'queued' WHERE state = 'completed'",
}


def test_each_harm_is_named(store: Store) -> None:
    sound(store)
    assert said(store) == []
    with without_constraints(store) as harmed:
        for case, harm in CASES.items():
            with harmed(harm):
                assert case in said(store)
    assert said(store) == []


def test_more_of_a_kind_are_told_of_together(store: Store) -> None:
    load(store, 40, batch_size=2)
    with without_constraints(store) as harmed, harmed("UPDATE batches SET total = 3"):
        findings = said(store)
    assert len(findings) == MOST_OF_A_KIND + 1
    assert findings[-1] == "counts: and more like the last"


def test_nothing_is_wrong_with_jobs_in_every_state(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'old.db'}"
    old_store.build(url, revision="head")
    store = Store(url)
    assert said(store) == []
    assert len(store.checking.job_ids()) == len(JobState) - 1


def test_a_read_only_store_writes_nothing(store: Store) -> None:
    sound(store)
    looking = Store(store.database.url.render_as_string(hide_password=False), read_only=True)
    try:
        assert said(looking) == []
        with pytest.raises(StoreError, match=r"read-?only"), looking.database.write() as connection:
            connection.execute(text("UPDATE jobs SET name = 'written'"))
    finally:
        looking.close()


def command(home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environ = {"PATH": os.environ["PATH"], "BATCHMILL_HOME": str(home)}
    return forked.finished(words, env=environ)


def test_the_command_tells_what_is_wrong_and_changes_no_byte(tmp_path: Path) -> None:
    file = tmp_path / "batchmill.db"
    old_store.build(f"sqlite:///{file}", revision="head")
    done = command(tmp_path, "db", "check")
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == f"batchmill: 5 jobs of sqlite:///{file} checked: no problems\n"
    with sqlite3.connect(file) as connection:
        connection.execute("UPDATE batches SET succeeded = 0 WHERE job_id = 'completed'")
    connection.close()
    before = contents(tmp_path)
    done = command(tmp_path, "db", "check")
    assert done.returncode == 1
    assert [line.split(": batch")[0] for line in done.stdout.splitlines()] == ["FAIL  counts  job completed"] * 2 + [
        "FAIL  states  job completed"
    ] * 2
    assert done.stderr.count("\n") == 1
    assert "restore a backup" in done.stderr
    assert len(json.loads(command(tmp_path, "db", "check", "--json").stdout)) == 4
    assert command(tmp_path, "db", "current").returncode == 0
    assert contents(tmp_path) == before


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_store_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    done = command(tmp_path, "db", "check")
    assert done.returncode == 1
    assert "has no tables yet" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_what_a_crash_left_half_written_is_told_of(tmp_path: Path) -> None:
    """A rollback journal that only a writer takes back: a process that is killed inside of a transaction leaves one."""
    file = tmp_path / "batchmill.db"
    old_store.build(f"sqlite:///{file}", revision="head")
    code = (
        "import os, sqlite3, sys\n"
        "connection = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "connection.execute('PRAGMA cache_size=1')\n"
        "connection.execute('BEGIN IMMEDIATE')\n"
        "connection.execute('CREATE TABLE much AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n"
        " LIMIT 20000) SELECT i, hex(randomblob(50)) AS j FROM n')\n"
        "os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(file)])
    done = command(tmp_path, "db", "check")
    assert done.returncode == 1
    assert "taken back first, as `batchmill jobs` does" in done.stderr
    assert done.stderr.count("\n") == 1
    assert command(tmp_path, "jobs").returncode == 0
    assert command(tmp_path, "db", "check").returncode == 0
