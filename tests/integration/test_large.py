"""A file of a million lines: memory does not grow with it, and nothing of it is lost."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.integration.conftest import Mill

LINES = 1_000_000
MOST_BYTES = 200_000_000

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def peak_bytes(mill: Mill, *words: str | Path) -> int:
    """The largest resident memory of a command that has to succeed."""
    command = [sys.executable, "-m", "producer", *map(str, words)]
    process = subprocess.Popen(command, env=mill.environ(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        try:
            peak = max(peak, psutil.Process(process.pid).memory_info().rss)
            process.wait(0.02)
        except (psutil.NoSuchProcess, subprocess.TimeoutExpired):
            continue
    assert process.returncode == 0
    return peak


def test_a_million_lines_through_the_mill_in_flat_memory(mill: Mill, tmp_path: Path) -> None:
    file, out = tmp_path / "p.jsonl", tmp_path / "out.jsonl"
    filling = "x" * 480
    with file.open("w") as lines:
        for index in range(LINES):
            lines.write(json.dumps({"prompt": f"{index} {filling}"}) + "\n")
    mill.start("worker", "-m", "echo")
    assert peak_bytes(mill, "submit", file, "-m", "echo") < MOST_BYTES
    mill.command("wait", "last", "--timeout", "600")
    assert peak_bytes(mill, "results", "last", "-o", out) < MOST_BYTES
    with out.open() as lines:
        for index, line in enumerate(lines):
            answer = json.loads(line)
            assert (answer["index"], answer["text"]) == (index, f"{index} {filling}")
    assert index == LINES - 1
