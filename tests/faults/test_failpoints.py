"""A crash at every named point, then a look at the whole store and at the exported file."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import time
from collections import Counter
from pathlib import Path

import pytest

from batchmill.jobs.runtime.failpoints import POINTS
from batchmill.jobs.store.store import Store
from tests.integration.conftest import Mill, until
from tests.support.store.oracle import export_violations, violations

COUNT = 120
PACE = {"echo_step_seconds": 0.1, "engine_rows": 10}
TEXTS = [f"one two {index}" for index in range(COUNT)]


class Night:
    """One job from submit to exported file under a supervised worker, whatever is killed on the way."""

    def __init__(self, mill: Mill, folder: Path, point: str, failpoint: str) -> None:
        self._mill = mill
        self._folder = folder
        self._point = point
        self._settings = {**PACE, "failpoint": failpoint, "busy_seconds": 10, "loading_lease_seconds": 3}
        self._prompts = folder / "prompts.jsonl"
        self._prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS))
        self.out = folder / "answers.jsonl"

    def run(self) -> str:
        """The job's id, once its answers are exported."""
        submit = ("submit", self._prompts, "-m", "echo", "--batch-size", "16", "--idempotency-key", "night")
        job_id = self._survived(*submit)
        self._mill.start("worker", "-m", "echo", "--devices", "cpu", **self._settings)
        until(lambda: self._mill.succeeded(job_id) > 10, "some answers")
        if self._point == "spool.written":
            self._lock_the_store()
        self._kill_the_child()
        self._mill.command("wait", job_id, "--timeout", "300")
        self._survived("results", job_id, "-o", self.out)
        return job_id

    def passings(self) -> Counter[str]:
        """Counts the passings of the point by each process."""
        return Counter((self._mill.home / f"failpoint.{self._point}").read_text().splitlines())

    def _survived(self, *words: str | Path) -> str:
        """Runs a command, again if it was killed on the way, and returns its stdout."""
        done = self._mill.finished(*words, **self._settings)
        if done.returncode == -signal.SIGKILL:
            done = self._mill.finished(*words, **self._settings)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def _kill_the_child(self) -> None:
        """Ends the process that holds the model, if it has not met its end already."""
        rows = self._mill.store.workers.rows()
        found = self._mill.store.registration.heartbeat(rows[-1].id, beat=1.0).child_pid if rows else None
        if found is not None:
            try:
                os.kill(found, signal.SIGKILL)
            except ProcessLookupError:
                return

    def _lock_the_store(self) -> None:
        """Somebody else holds the database for longer than a child waits."""
        if not self._mill.store.database.is_sqlite:
            return
        other = sqlite3.connect(self._mill.settings.database_file, timeout=10, isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        time.sleep(4)
        other.execute("ROLLBACK")
        other.close()


@pytest.mark.parametrize("point", POINTS)
def test_a_crash_at_each_point_loses_and_doubles_nothing(mill: Mill, tmp_path: Path, point: str) -> None:
    night = Night(mill, tmp_path, point, f"{point}=kill9@1")
    night.run()
    assert (mill.home / f"failpoint.{point}").exists(), "the point was not passed"
    check(mill.store, night.out)


def check(store: Store, out: Path) -> None:
    """Checks the store and the export; the remains of a killed submit are deleted once its lease has ended."""
    until(lambda: violations(store) == [], f"the store is whole: {violations(store)}")
    assert export_violations(out.read_text().splitlines(), texts=TEXTS) == []
