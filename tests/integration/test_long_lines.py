"""Files of long lines: no process of batchmill grows with their number."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from batchmill.jobs.configuration.settings import load_settings
from tests.integration.conftest import Mill, child_of

MIB = 1024**2
LINE = "x" * 4_000_000
#: The bodies of the lines that are more take more than this by themselves, and a process had several copies of each.
MOST_GROWTH_BYTES = 128 * MIB
#: A process begins with the peak of the one that it is forked from; pytest's is large.
_MEASURED = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
sys.exit(code)
"""

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="counts memory as Linux does"),
    pytest.mark.timeout(600),
]


def peak_bytes(mill: Mill, *words: str | Path) -> int:
    """The most memory that a command, or a process that it has started and waited for, has had."""
    measured = [sys.executable, "-c", _MEASURED, sys.executable, "-m", "batchmill", *map(str, words)]
    done = subprocess.run(measured, capture_output=True, text=True, env=mill.environ())
    assert done.returncode == 0, f"{words}: exit {done.returncode}\n{done.stderr}"
    return int(done.stdout.splitlines()[-1])


def peak_bytes_of(pid: int) -> int:
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(status["VmHWM"].removesuffix("kB")) * 1024


def write(path: Path, *, lines: int) -> Path:
    with path.open("w") as file:
        for index in range(lines):
            file.write(json.dumps({"prompt": f"{index} {LINE}"}) + "\n")
    return path


def check(out: Path, *, lines: int) -> None:
    """Every answer is there, and is the prompt."""
    with out.open() as answers:
        same = [json.loads(line)["text"] == f"{index} {LINE}" for index, line in enumerate(answers)]
    assert same == [True] * lines


def check_growth(few: dict[str, int], many: dict[str, int]) -> None:
    grown = {name: many[name] - few[name] for name in few}
    assert max(grown.values()) < MOST_GROWTH_BYTES, {name: f"{each // MIB} MiB more" for name, each in grown.items()}


def test_a_run_and_its_worker_and_results_are_flat(tmp_path: Path) -> None:
    """On a store in SQLite, with all that `run` starts."""
    found = []
    for lines in (16, 64):
        mill = Mill(tmp_path / f"home-{lines}", load_settings(home=tmp_path / f"home-{lines}"))
        file, out = write(tmp_path / "p.jsonl", lines=lines), tmp_path / "out.jsonl"
        found.append({"run": peak_bytes(mill, "run", file, "-m", "echo", "-o", out)})
        check(out, lines=lines)
        found[-1]["results"] = peak_bytes(mill, "results", "last", "-o", out)
        check(out, lines=lines)
    check_growth(*found)


@pytest.fixture
def postgresql_mill(postgresql_url: str, tmp_path: Path) -> Iterator[Mill]:
    (tmp_path / "home").mkdir()
    mill = Mill(tmp_path / "home", load_settings(home=tmp_path / "home", database_url=postgresql_url))
    mill.redis.start()
    yield mill
    mill.end()


def test_submit_and_the_child_of_a_worker_and_results_are_flat_on_postgresql(
    postgresql_mill: Mill, tmp_path: Path
) -> None:
    mill, found = postgresql_mill, []
    worker = mill.start("worker", "-m", "echo")
    for lines in (12, 48):
        file, out = write(tmp_path / "p.jsonl", lines=lines), tmp_path / "out.jsonl"
        found.append({"submit": peak_bytes(mill, "submit", file, "-m", "echo")})
        mill.command("wait", "last", "--timeout", "400")
        found[-1]["child"] = peak_bytes_of(child_of(worker))
        found[-1]["results"] = peak_bytes(mill, "results", "last", "-o", out)
        check(out, lines=lines)
    check_growth(*found)
