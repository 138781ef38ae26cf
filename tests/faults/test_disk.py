"""A full disk: answers wait, nothing is half written, and when there is space again all goes on by itself."""

from __future__ import annotations

import os
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from batchmill.jobs.configuration.settings import load_settings
from tests.faults.conftest import SLOW, FaultMill, answers
from tests.integration.conftest import TIMERS, child_of, until, write_prompts
from tests.support.store.oracle import accepted, changed, export_violations, violations

SIZE_BYTES = 4 * 1024**2
REQUESTS = 200


class Disk:
    """A small disk of a test's own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ballast = folder / "ballast"

    def fill(self) -> None:
        """To the last byte, also what others free meanwhile."""
        with self._ballast.open("ab", buffering=0) as file:
            for size in (65_536, 4_096, 1):
                try:
                    while file.write(b"\0" * size):
                        pass
                except OSError:
                    continue

    def free(self) -> None:
        self._ballast.unlink()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """Skipped where the test may not mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE_BYTES},mode=700", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("only root may mount a small disk")
    yield Disk(folder)
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(params=["store on it", "spool on it too"])
def disk_mill(request: pytest.FixtureRequest, disk: Disk, home: Path, sqlite_template: Path) -> Iterator[FaultMill]:
    """A mill whose SQLite store is on the small disk; with its whole home there, nothing can be spooled either."""
    settings: dict[str, object] = {"home": home}
    if request.param == "store on it":
        settings["database_url"] = f"sqlite:///{disk.folder}/batchmill.db"
    else:
        settings["home"] = disk.folder
    (disk.folder / "batchmill.db").write_bytes(sqlite_template.read_bytes())
    mill = FaultMill(Path(str(settings["home"])), load_settings(**settings, **TIMERS))
    mill.redis.start()
    yield mill
    mill.end()


def test_a_disk_that_is_full_at_a_save_is_waited_for(disk_mill: FaultMill, disk: Disk) -> None:
    mill = disk_mill
    worker = mill.ready_worker(**SLOW)
    child = child_of(worker)
    job_id = mill.submit(REQUESTS)
    until(lambda: mill.succeeded(job_id) > 50, "some answers")
    before = accepted(mill.store)
    until(lambda: full(disk, mill, worker), "the worker says that the disk is full")
    stopped_at = mill.succeeded(job_id)
    assert stopped_at < REQUESTS
    assert worker.poll() is None
    disk.free()
    mill.wait(job_id)
    mill.check_ended(job_id, REQUESTS)
    assert changed(before, mill.store) == []
    assert child_of(worker) == child
    assert mill.repeated() == 0
    with sqlite3.connect(mill.settings.database.removeprefix("sqlite:///")) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    connection.close()


def full(disk: Disk, mill: FaultMill, worker: subprocess.Popen[str]) -> bool:
    disk.fill()
    return "no space left for the store" in mill.log_of(worker)


def test_a_disk_that_is_full_at_a_submit_leaves_no_job(disk: Disk, home: Path, sqlite_template: Path) -> None:
    (disk.folder / "batchmill.db").write_bytes(sqlite_template.read_bytes())
    mill = FaultMill(home, load_settings(home=home, database_url=f"sqlite:///{disk.folder}/batchmill.db", **TIMERS))
    mill.redis.start()
    file = write_prompts(home / "p.jsonl", 60_000)
    disk.fill()
    done = mill.finished("submit", file, "-m", "echo")
    assert done.returncode == 1
    assert "no space left" in done.stderr
    assert "Traceback" not in done.stderr
    disk.free()
    assert mill.store.jobs.jobs(most=1) == []
    mill.ready_worker()
    job_id = mill.submit(20)
    mill.wait(job_id)
    mill.check_ended(job_id, 20)
    mill.end()


def test_a_disk_that_is_full_at_an_export_leaves_the_old_file(mill: FaultMill, disk: Disk) -> None:
    mill.ready_worker()
    job_id = mill.submit(2_000)
    mill.wait(job_id)
    out, table = disk.folder / "answers.jsonl", disk.folder / "answers.csv"
    for each in (out, table):
        each.write_text("what was there before\n")
    disk.fill()
    for form, target in (("jsonl", out), ("openai", out), ("csv", table)):
        done = mill.finished("results", job_id, "-o", target, "--format", form)
        assert done.returncode == 1
        assert done.stderr.startswith("batchmill: cannot write")
        assert "No space left" in done.stderr
        assert target.read_text() == "what was there before\n"
        assert {each.name for each in disk.folder.iterdir()} == {"answers.jsonl", "answers.csv", "ballast"}
    disk.free()
    mill.command("results", job_id, "-o", out)
    assert export_violations(out.read_text().splitlines(), texts=answers(2_000)) == []
    assert violations(mill.store) == []
