"""Fixtures of tests of the producer."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from batchmill.jobs.requests.generation import GenerationOptions, SamplingParams
from batchmill.jobs.requests.request import ErrorCode
from batchmill.jobs.runtime.process.process import Process
from batchmill.jobs.store.leases.lease import BatchReport
from batchmill.jobs.store.store import Store
from tests.support.prompt_files import error, write
from tests.support.store import mill


@pytest.fixture
def problem(tmp_path: Path) -> Callable[..., str]:
    """The message for a file of one bad line, after `file:1: `."""

    def read(line: bytes | dict[str, Any], *, name: str = "prompts.jsonl", **options: Any) -> str:
        data = line if isinstance(line, bytes) else json.dumps(line).encode()
        path = write(tmp_path, data, name)
        caught = error(path, **options)
        assert caught.count == 1
        [text] = caught.problems
        assert text.startswith(f"{path}:1: ")
        return text.removeprefix(f"{path}:1: ")

    return read


@pytest.fixture
def half_done(store: Store) -> str:
    """A job of ten requests: two succeeded, two failed, one worker at work."""
    flags = GenerationOptions(None, SamplingParams(temperature=0.0))
    job_id = mill.load(store, 10, name="nightly", options=flags)
    who = mill.session(store)
    (claimed,) = mill.claim(store, who)
    mill.save(store, who, [mill.answered(claimed, count=2)])
    errors = [mill.output(job_id, index, error=ErrorCode.ENGINE_ERROR) for index in (2, 3)]
    mill.save(store, who, [BatchReport(claimed.lease, outputs=errors)])
    mill.claim(store, who)
    return job_id


@pytest.fixture
def ended_process() -> Process:
    """A process of this machine that has ended."""
    live = Process.own()
    assert live is not None
    return replace(live, start_ticks=live.start_ticks - 1)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one mebibyte."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mounting, capture_output=True).returncode:
        pytest.skip("mounting a small disk takes rights that are missing here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
