"""Workers that are told to end again and again: nothing is lost, and no request is blamed."""

from __future__ import annotations

import random
import time
from pathlib import Path

from sqlalchemy import func, select

from batchmill.jobs.store.tables import batches
from tests.integration.conftest import PATIENCE_SECONDS, Mill, until, write_prompts
from tests.support.store.oracle import export_violations, violations

PACE = {"echo_step_seconds": 0.1, "engine_rows": 10}


def test_a_storm_of_restarts_loses_nothing_and_blames_nobody(mill: Mill, tmp_path: Path) -> None:
    moments = random.Random(5)
    job_id = mill.command("submit", write_prompts(tmp_path / "p.jsonl", 400), "-m", "echo").strip()
    for _ in range(4):
        workers = [mill.start("worker", "-m", "echo", "--name", name, **PACE) for name in ("a", "b")]
        time.sleep(moments.uniform(0.2, 3.0))  # in whatever phase that finds them
        for worker in workers:
            worker.terminate()
        assert [worker.wait(PATIENCE_SECONDS) for worker in workers] == [0, 0]
    mill.start("worker", "-m", "echo")
    mill.command("wait", job_id, "--timeout", "300")
    with mill.store.database.read() as connection:
        assert connection.scalar(select(func.max(batches.c.crashes))) == 0
    texts = [f"one two three {index}" for index in range(400)]
    assert export_violations(mill.command("results", job_id).splitlines(), texts=texts) == []
    until(lambda: violations(mill.store) == [], "the store is whole")
