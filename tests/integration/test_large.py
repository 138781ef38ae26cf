"""A file of a million lines: memory does not grow with it, and nothing of it is lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.integration.conftest import Mill
from tests.tools.bench.mill import command

LINES = 1_000_000
MOST_BYTES = 200_000_000

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_a_million_lines_through_the_mill_in_flat_memory(mill: Mill, tmp_path: Path) -> None:
    file, out = tmp_path / "p.jsonl", tmp_path / "out.jsonl"
    filling = "x" * 480
    with file.open("w") as lines:
        for index in range(LINES):
            lines.write(json.dumps({"prompt": f"{index} {filling}"}) + "\n")
    mill.start("worker", "-m", "echo")
    assert command(mill.home, "submit", file, "-m", "echo")[1] < MOST_BYTES
    mill.command("wait", "last", "--timeout", "600")
    assert command(mill.home, "results", "last", "-o", out)[1] < MOST_BYTES
    with out.open() as lines:
        for index, line in enumerate(lines):
            answer = json.loads(line)
            assert (answer["index"], answer["text"]) == (index, f"{index} {filling}")
    assert index == LINES - 1
