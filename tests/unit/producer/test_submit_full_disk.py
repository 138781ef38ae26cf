"""A submit onto a full disk."""

from __future__ import annotations

import subprocess
from pathlib import Path

from batchmill.jobs.store.store import Store
from tests.support.processes.command import command
from tests.support.store import mill


def test_a_submit_onto_a_full_disk_is_one_line_and_shows_no_half_job(
    sqlite_template: Path, small_disk: Path, tmp_path: Path
) -> None:
    database = small_disk / "store.db"
    database.write_bytes(sqlite_template.read_bytes())
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "%s"}\n' % ("x" * 400) * 12_000)
    store = Store(f"sqlite:///{database}")
    done = command(store, "submit", path, "-m", "echo", stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout) == (1, "")
    said = [line for line in done.stderr.splitlines() if line.startswith("batchmill: ")]
    assert said == [f"batchmill: no space left for the store sqlite:///{database}; free some and try again"]
    assert "Traceback" not in done.stderr
    assert store.jobs.jobs(most=5) == []
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    done = command(store, "submit", path, "-m", "echo", stdout=subprocess.PIPE, env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0
    assert [each.counts.total for each in store.jobs.jobs(most=5)] == [12_000]
    assert mill.rows(store, "requests") == 12_000
    store.close()
