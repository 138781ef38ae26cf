"""Runs every mutant in a copy of the checkout and prints which test caught it; one that lives is an error.

First the same tests run on the mill as it is, so that a red test is the mutant's doing.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from tests.support.paths import ROOT
from tests.tools.mutants.guards import MUTANTS
from tests.tools.mutants.mutant import Edit, Mutant

_PARTS = ("jobs", "producer", "worker", "migrations", "src", "tests", "pyproject.toml")
#: For each of the tests, on a busy machine; a mutant that hangs is told of as such.
_TEST_SECONDS = 600
_RED = re.compile(r"^(?:FAILED|ERROR) (\S+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Verdict:
    """The fate of a mutant: the test that went red, or why it lives."""

    guard: str
    caught_by: str | None
    problem: str | None
    seconds: float


class TextGone(Exception):
    """The text that a mutant replaces does not stand in its file exactly once."""


def main(words: Sequence[str]) -> int:
    """`words`: parts of guards' names; all mutants if there are none."""
    chosen = [each for each in MUTANTS if not words or any(word in each.guard for word in words)]
    with tempfile.TemporaryDirectory(prefix="batchmill-mutants-") as folder:
        copy = Path(folder) / "checkout"
        _copy(copy)
        red, output = _run(copy, sorted({test for each in chosen for test in each.tests}))
        if red is not None:
            _say(output[-20_000:])
            _say(f"{red} is red without any mutant")
            return 1
        width = max(len(each.guard) for each in chosen)
        verdicts = []
        for mutant in chosen:
            verdict = _try(mutant, copy)
            verdicts.append(verdict)
            said = verdict.caught_by or f"!!! {verdict.problem}"
            _say(f"{verdict.guard:{width}}  {verdict.seconds:6.1f} s  {said}")
    alive = sum(verdict.caught_by is None for verdict in verdicts)
    _say(f"{len(verdicts) - alive} of {len(verdicts)} mutants were caught")
    return 1 if alive else 0


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _copy(to: Path) -> None:
    to.mkdir()
    for part in _PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, to / part, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, to / part)


def _try(mutant: Mutant, copy: Path) -> Verdict:
    begin = monotonic()
    originals = {edit.file: (copy / edit.file).read_text() for edit in mutant.edits}
    try:
        for edit in mutant.edits:
            _apply(edit, copy)
        red, _ = _run(copy, mutant.tests)
        problem = None if red else "it lives: no test went red"
    except TextGone as gone:
        red, problem = None, str(gone)
    finally:
        for name, text in originals.items():
            (copy / name).write_text(text)
    return Verdict(mutant.guard, red, problem, monotonic() - begin)


def _apply(edit: Edit, copy: Path) -> None:
    path = copy / edit.file
    text = path.read_text()
    if text.count(edit.old) != 1:
        raise TextGone(f"{edit.file} has {text.count(edit.old)} times: {edit.old.strip()!r}")
    path.write_text(text.replace(edit.old, edit.new))


def _run(copy: Path, tests: Sequence[str]) -> tuple[str | None, str]:
    """The first test that went red, if one did, and what pytest said."""
    command = [sys.executable, "-m", "pytest", "-p", "tests.tools.mutants.brief", "--numprocesses=0", "--exitfirst"]
    command += ["--quiet", "--durations=1", "-m", "not slow", *tests]
    path = os.pathsep.join([str(copy), str(copy / "src")])
    environment = os.environ | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    seconds = _TEST_SECONDS * len(tests)
    try:
        ended = subprocess.run(
            command, cwd=copy, env=environment, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return "(the time was up)", ""
    if ended.returncode == 0:
        return None, ended.stdout
    found = _RED.search(ended.stdout)
    return (found[1] if found else f"(pytest ended with {ended.returncode})"), ended.stdout + ended.stderr


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
