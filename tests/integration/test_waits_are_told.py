"""Real commands and workers that have to wait: each says what for, since when, and who holds it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import psutil

from batchmill.jobs.models.digests import Digests
from batchmill.jobs.models.spec import DEMO_FOLDER
from batchmill.jobs.requests.states import WorkerState
from batchmill.jobs.runtime.home import socket_path
from batchmill.jobs.runtime.process.pid_file import PidFile
from tests.integration.conftest import PATIENCE_SECONDS, Mill, until, write_prompts
from tests.support.processes.holding import file_lock, transaction

_SINCE = r"waiting since \d\d:\d\d:\d\d UTC \(\d+ s\) for "


def said(process: subprocess.Popen[str], pattern: str) -> str:
    """The first line of a process that has this in it."""
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if re.search(pattern, line):
            return line
    raise AssertionError(f"it ended without {pattern}: {seen}")


def test_a_command_says_who_holds_the_store_and_goes_on(mill: Mill, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "p.jsonl", 3)
    with transaction(mill.home / "batchmill.db") as pid:
        command = mill.start("submit", prompts, "-m", "echo", busy_seconds=PATIENCE_SECONDS)
        said(command, rf"^batchmill: {_SINCE}the store sqlite:\S+batchmill\.db, which is locked by pid {pid}$")
    assert command.wait(PATIENCE_SECONDS) == 0
    assert mill.store.jobs.jobs(most=1)[0].counts.total == 3


def test_a_worker_that_waits_for_the_store_says_who_holds_it(mill: Mill) -> None:
    with transaction(mill.home / "batchmill.db") as pid:
        worker = mill.start("worker", "-m", "echo")
        line = said(worker, f"the store is locked by pid {pid}; this process waits for it")
        assert "waited_seconds=" in line
    until(lambda: mill.store.workers.rows(), "it is registered")


def test_a_command_says_who_upgrades_the_store(mill: Mill, tmp_path: Path) -> None:
    home = tmp_path / "another"
    home.mkdir()
    with file_lock(home / "upgrade.lock") as pid:
        command = mill.start("db", "upgrade", home=home)
        said(
            command,
            rf"^batchmill: {_SINCE}{home}/upgrade\.lock, the lock of upgrades .*, which is locked by pid {pid}$",
        )
    assert command.wait(PATIENCE_SECONDS) == 0
    assert (home / "batchmill.db").exists()


def test_a_command_says_that_redis_does_not_answer(mill: Mill, tmp_path: Path) -> None:
    socket = str(socket_path(mill.home))
    ours = [each for each in psutil.Process().children() if socket in " ".join(each.cmdline())]
    (redis,) = ours  # other tests' servers may live beside it
    assert PidFile(mill.home / "redis.pid").shown() == f"pid {redis.pid}"
    redis.suspend()
    try:
        command = mill.start("submit", write_prompts(tmp_path / "p.jsonl", 3), "-m", "echo")
        said(command, rf"^batchmill: {_SINCE}Redis at redis\+socket://")
    finally:
        redis.resume()
    assert command.wait(PATIENCE_SECONDS) == 0


def test_whoever_waits_for_a_job_hears_what_its_worker_loads(mill: Mill, tmp_path: Path) -> None:
    job_id = mill.command("submit", write_prompts(tmp_path / "p.jsonl", 2), "-m", "demo").strip()
    hashing = Digests(mill.home)._file(DEMO_FOLDER).with_suffix(".lock")
    hashing.parent.mkdir()
    with file_lock(hashing) as pid:
        worker = mill.start("worker", "-m", "demo", "--name", "slow")
        line = said(
            worker, rf"{_SINCE}\S+\.lock, the lock of who hashes a folder's files, which is locked by pid {pid}$"
        )
        assert "[warning" in line
        (row,) = mill.store.workers.rows()
        assert (row.state, row.torch_load_seconds is None) == (WorkerState.LOADING, False)
        loading = r"loading (torch [\d a-z]+, )?the model [\d a-z]+"
        said(mill.start("wait", job_id), rf"queued: 0/2 requests ended, worker slow is {loading}$")
        assert re.search(loading, mill.command("workers"))
        assert re.search(rf"waiting    worker slow is {loading}", mill.command("status", job_id))
    mill.command("wait", job_id, "--timeout", "300")
    (row,) = mill.store.workers.rows()
    assert (row.state, row.loading_seconds) == (WorkerState.READY, None)
    assert not re.search(loading, mill.command("workers"))
