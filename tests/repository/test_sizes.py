"""Files and functions stay short enough to be read at one sitting."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import ROOT

SOURCE = ("jobs", "migrations", "producer", "worker")
MOST_LINES = {"source": 300, "tests": 400}
MOST_FUNCTION_LINES = 50
#: Released migrations stay as they are.
RELEASED = "migrations/versions"


def source_files(root: Path = ROOT) -> list[Path]:
    found = [path for room in SOURCE for path in (root / room).rglob("*.py")]
    return [path for path in found if RELEASED not in path.as_posix()]


def long_files(paths: list[Path], most: int) -> list[str]:
    counted = {path: len(path.read_text().splitlines()) for path in paths}
    return [f"{path}: {lines} lines" for path, lines in counted.items() if lines > most]


def long_functions(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            if lines > MOST_FUNCTION_LINES:
                yield f"{path}:{node.lineno}: {node.name} has {lines} lines"


def test_no_source_file_is_long() -> None:
    paths = source_files()
    assert len(paths) > 300
    assert long_files(paths, MOST_LINES["source"]) == []


def test_no_test_file_is_long() -> None:
    paths = list((ROOT / "tests").rglob("*.py"))
    assert len(paths) > 250
    assert long_files(paths, MOST_LINES["tests"]) == []


def test_no_function_is_long() -> None:
    assert [line for path in source_files() for line in long_functions(path)] == []


@pytest.mark.parametrize(("lines", "found"), [(50, 0), (51, 1)])
def test_an_offender_is_found(tmp_path: Path, lines: int, found: int) -> None:
    path = tmp_path / "jobs" / "a.py"
    path.parent.mkdir()
    path.write_text("def long():\n" + "    pass\n" * (lines - 1))
    assert source_files(tmp_path) == [path]
    assert len(list(long_functions(path))) == len(long_files([path], 50)) == found
