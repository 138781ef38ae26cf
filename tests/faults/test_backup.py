"""A copy of the store, taken while a job runs, is a whole store: the job goes on from there."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from batchmill.jobs.store.store import Store
from tests.integration.conftest import Mill, until, write_prompts
from tests.support.paths import ROOT
from tests.support.store.oracle import export_violations, violations

GUIDE = ROOT / "docs/guides/backup.md"


def shown_command() -> list[str]:
    """The command that the guide gives, with this Python."""
    (line,) = [each for each in GUIDE.read_text().splitlines() if each.startswith("$ python -c 'import sqlite3")]
    return [sys.executable, *shlex.split(line.removeprefix("$ "))[1:]]


def test_a_backup_taken_in_mid_job_is_restored_and_finished(mill: Mill, tmp_path: Path) -> None:
    worker = mill.start("worker", "-m", "echo", echo_step_seconds=0.1, engine_rows=10)
    job_id = mill.command("submit", write_prompts(tmp_path / "p.jsonl", 2_000), "-m", "echo").strip()
    until(lambda: mill.succeeded(job_id) > 20, "some answers")
    copy = tmp_path / "copy.db"
    where = {"batchmill.db": str(mill.settings.database_file), "backup.db": str(copy)}
    command = [where.get(word, word) for word in shown_command()]
    subprocess.run(command, check=True, env=os.environ)
    worker.kill()
    shutil.copy(copy, mill.settings.database_file)
    restored = Store(mill.settings.database)
    assert 20 < restored.jobs.job(job_id).counts.succeeded < 2_000
    restored.close()
    mill.start("worker", "-m", "echo")
    mill.command("wait", job_id, "--timeout", "300")
    texts = [f"one two three {index}" for index in range(2_000)]
    assert export_violations(mill.command("results", job_id).splitlines(), texts=texts) == []
    assert violations(mill.store) == []
