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

import psutil

from jobs.embedded import EmbeddedRedis
from jobs.schema import WorkerState
from jobs.settings import environment_of, load_settings
from jobs.store import Store
from migrations import open_store
from producer.status import JobStatus
from tests.bench.table import Row

_LINE_BYTES = 500
_ECHO_REQUESTS = 100_000


def submit(lines: int) -> list[Row]:
    """A file of 500-byte lines into SQLite."""
    with _home() as home:
        file = _prompts(home, lines)
        seconds, peak_bytes = _command(home, "submit", file, "-m", "echo")
    return [
        Row(f"submit {lines:,} lines of {_LINE_BYTES} bytes", f"{lines / seconds:,.0f} lines/s", "40,000"),
        Row("submit, peak resident memory", f"{peak_bytes / 2**20:,.0f} MiB", "under 200 MB"),
    ]


def echo(_lines: int) -> list[Row]:
    """One worker with the echo engine, from submit to the results in a file."""
    with _home() as home:
        file = _prompts(home, _ECHO_REQUESTS)
        redis = EmbeddedRedis(home)
        redis.start()
        worker = _start(home, "worker", "-m", "echo")
        try:
            _wait_for_worker(home)
            begin = perf_counter()
            _command(home, "submit", file, "-m", "echo", "--wait")
            answered = perf_counter() - begin
            _command(home, "results", "last", "-o", home / "out.jsonl")
            whole = perf_counter() - begin
        finally:
            worker.terminate()
            worker.wait()
            redis.stop()
    return [
        Row("echo, submit to the last answer saved", f"{_ECHO_REQUESTS / answered:,.0f} requests/s", "5,000"),
        Row("echo, submit to results in a file", f"{_ECHO_REQUESTS / whole:,.0f} requests/s", "5,000"),
    ]


def results_and_status(lines: int) -> list[Row]:
    """Export and status of a finished job of so many outputs."""
    with _home() as home:
        file = _prompts(home, lines)
        _command(home, "run", file, "-m", "echo", "-o", home / "out.jsonl")
        seconds, peak_bytes = _command(home, "results", "last", "-o", home / "out.jsonl")
        status_seconds, _ = _command(home, "status", "last", "--json")
        store = Store(load_settings(home=home).database)
        job_id = store.reading.find("last")
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
def _home() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="batchmill-bench-") as folder:
        yield Path(folder)


def _prompts(home: Path, lines: int) -> Path:
    path = home / "prompts.jsonl"
    with path.open("w") as file:
        for index in range(lines):
            head = json.dumps({"prompt": f"{index} "})[:-2]
            file.write(head + "x" * (_LINE_BYTES - len(head) - 3) + '"}\n')
    return path


def _environ(home: Path) -> dict[str, str]:
    return {**os.environ, **environment_of(load_settings(home=home))}


def _start(home: Path, *words: str | Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "producer", *map(str, words)]
    return subprocess.Popen(command, env=_environ(home), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _command(home: Path, *words: str | Path) -> tuple[float, int]:
    """Runs a command: its seconds, and the largest resident memory that was seen."""
    begin = perf_counter()
    process = _start(home, *words)
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


def _wait_for_worker(home: Path) -> None:
    store = open_store(load_settings(home=home))
    while not any(each.state is WorkerState.READY for each in store.workers.rows()):
        sleep(0.05)
    store.close()
