"""The start of a command: its CPU time against that of importing the libraries that it cannot do without."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from batchmill.jobs.configuration.settings import environment_of, load_settings
from tests.tools.bench.mill import command, home
from tests.tools.bench.table import Row

_ROUNDS = 15
_OF_STATUS = "import sqlalchemy, pydantic_settings"


def start(_lines: int) -> list[Row]:
    """`--help` against click, and `status` against the store's libraries."""
    with home() as folder:
        prompts = folder / "prompts.jsonl"
        prompts.write_text('{"prompt": "x"}\n')
        command(folder, "submit", prompts, "-m", "echo")
        return [
            Row("CPU of `--help`, times `import click`", _times(folder, "--help", "import click"), "at most 3"),
            Row("CPU of `status`, times its libraries'", _times(folder, "status", _OF_STATUS), "at most 1.5"),
        ]


def _times(folder: Path, word: str, code: str) -> str:
    """The least of several rounds each, in turns, so that what else the machine does falls on both."""
    environ = {**os.environ, **environment_of(load_settings(home=folder))}
    lines = (["-m", "batchmill", word], ["-c", code])
    rounds = [[_cpu_seconds([sys.executable, *line], environ) for line in lines] for _ in range(_ROUNDS)]
    ours, theirs = map(min, zip(*rounds, strict=True))
    return f"{ours / theirs:.2f} ({ours * 1e3:,.0f}/{theirs * 1e3:,.0f} ms)"


def _cpu_seconds(line: Sequence[str], environ: Mapping[str, str]) -> float:
    """User's and system's time of a process and of those that it waited for."""
    process = subprocess.Popen(line, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(f"bench: {line} ended with {process.returncode}")
    return used.ru_utime + used.ru_stime
