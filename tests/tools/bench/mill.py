"""Queue and store: submit, the echo engine from submit to results, export, status. Each part is a real command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter, sleep
from typing import IO

import psutil

from batchmill.jobs.broker.embedded import EmbeddedRedis
from batchmill.jobs.configuration.settings import environment_of, load_settings
from batchmill.jobs.requests.states import WorkerState
from batchmill.jobs.store.store import Store
from batchmill.migrations.revisions import open_store
from batchmill.producer.views.status import JobStatus
from tests.tools.bench.table import Row

_LINE_BYTES = 500
_ECHO_REQUESTS = 100_000


def submit(lines: int) -> list[Row]:
    """A file of 500-byte lines into SQLite."""
    with home() as folder:
        file = _prompts(folder, lines)
        seconds, peak_bytes = command(folder, "submit", file, "-m", "echo")
    return [
        Row(f"submit {lines:,} lines of {_LINE_BYTES} bytes", f"{lines / seconds:,.0f} lines/s", "40,000"),
        Row("submit, peak resident memory", f"{peak_bytes / 2**20:,.0f} MiB", "under 200 MB"),
    ]


def echo(_lines: int) -> list[Row]:
    """One worker with the echo engine, from submit to the results in a file."""
    with home() as folder:
        file = _prompts(folder, _ECHO_REQUESTS)
        redis = EmbeddedRedis(folder)
        redis.start()
        worker = _start(folder, "worker", "-m", "echo")
        try:
            _wait_for_worker(folder)
            begin = perf_counter()
            command(folder, "submit", file, "-m", "echo", "--wait")
            answered = perf_counter() - begin
            command(folder, "results", "last", "-o", folder / "out.jsonl")
            whole = perf_counter() - begin
        finally:
            worker.terminate()
            worker.wait()
            redis.stop()
    return [
        Row("echo, submit to the last answer saved", f"{_ECHO_REQUESTS / answered:,.0f} requests/s", "5,000"),
        Row("echo, submit to results in a file", f"{_ECHO_REQUESTS / whole:,.0f} requests/s", "5,000"),
    ]


def first_answer(lines: int) -> list[Row]:
    """From `run` to its first answer: the file is read and the model loaded meanwhile."""
    with home() as folder:
        file = _prompts(folder, lines)
        begin = perf_counter()
        process = _start(folder, "run", file, "-m", "demo")
        store = open_store(load_settings(home=folder))
        while not any(each.counts.succeeded for each in store.jobs.jobs(most=1)):
            sleep(0.05)
        seconds = perf_counter() - begin
        store.close()
        process.terminate()
        process.wait()
    return [Row(f"run of {lines:,} lines on the demo model, to its first answer", f"{seconds:,.1f} s")]


def results_and_status(lines: int) -> list[Row]:
    """Export and status of a finished job of so many outputs."""
    with home() as folder:
        file = _prompts(folder, lines)
        command(folder, "run", file, "-m", "echo", "-o", folder / "out.jsonl")
        seconds, peak_bytes = command(folder, "results", "last", "-o", folder / "out.jsonl")
        status_seconds, _ = command(folder, "status", "last", "--json")
        store = Store(load_settings(home=folder).database)
        job_id = store.jobs.find("last")
        begin = perf_counter()
        JobStatus.read(store, job_id)
        read_seconds = perf_counter() - begin
        store.close()
    return [
        Row(f"results of {lines:,} outputs", f"{lines / seconds:,.0f} outputs/s", "50,000"),
        Row("results, peak resident memory", f"{peak_bytes / 2**20:,.0f} MiB", "flat"),
        Row("status of that job, in the store", f"{read_seconds * 1e3:,.0f} ms", "under 50 ms"),
        Row("status of that job, the whole command", f"{status_seconds * 1e3:,.0f} ms"),
    ]


@contextmanager
def home() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="batchmill-bench-") as folder:
        yield Path(folder)


def _prompts(folder: Path, lines: int) -> Path:
    path = folder / "prompts.jsonl"
    with path.open("w") as file:
        for index in range(lines):
            head = json.dumps({"prompt": f"{index} "})[:-2]
            file.write(head + "x" * (_LINE_BYTES - len(head) - 3) + '"}\n')
    return path


def _start(folder: Path, *words: str | Path, stdout: IO[bytes] | int = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
    line = [sys.executable, "-m", "batchmill", *map(str, words)]
    environ = {**os.environ, **environment_of(load_settings(home=folder))}
    return subprocess.Popen(line, env=environ, stdout=stdout, stderr=subprocess.DEVNULL)


def command(folder: Path, *words: str | Path, stdout: str = os.devnull) -> tuple[float, int]:
    """Runs a command in this home: its seconds, and the largest resident memory that was seen."""
    begin = perf_counter()
    with open(stdout, "wb") as file:
        process = _start(folder, *words, stdout=file)
    peak = 0
    while process.poll() is None:
        try:
            peak = max(peak, psutil.Process(process.pid).memory_info().rss)
            process.wait(0.02)
        except (psutil.NoSuchProcess, subprocess.TimeoutExpired):
            continue
    if process.returncode != 0:
        raise SystemExit(f"bench: {words} ended with {process.returncode}")
    return perf_counter() - begin, peak


def _wait_for_worker(folder: Path) -> None:
    store = open_store(load_settings(home=folder))
    while not any(each.state is WorkerState.READY for each in store.workers.rows()):
        sleep(0.05)
    store.close()
