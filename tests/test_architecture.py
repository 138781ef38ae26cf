"""The arrows between the rooms, and what importing them costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
#: What each room may import of the others. `migrations` opens stores for the entry points of both sides.
ALLOWED = {
    "jobs": set(),
    "migrations": {"jobs"},
    "producer": {"jobs", "migrations"},
    "worker": {"jobs", "migrations"},
}
HEAVY = ("torch", "transformers", "bitsandbytes", "accelerate", "peft")


def imported_rooms(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names & set(ALLOWED)


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_point_one_way(room: str) -> None:
    for path in (ROOT / room).rglob("*.py"):
        forbidden = imported_rooms(path) - ALLOWED[room] - {room}
        assert not forbidden, f"{path} imports {forbidden}"


@pytest.mark.parametrize(
    "module",
    [
        "producer.cli",
        "producer.local",
        "producer.submit",
        "producer.results",
        "producer.diagnosis",
        "jobs.store",
        "jobs.broker",
        "jobs.embedded",
        "migrations",
        "worker.cli",
        "worker.parent",
        "worker.keeper",
        "worker.app",
        "worker.supervisor",
    ],
)
def test_these_load_no_torch(module: str) -> None:
    code = f"import sys, {module}; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == ""


def test_the_jobs_room_knows_no_click() -> None:
    for path in (ROOT / "jobs").rglob("*.py"):
        assert "import click" not in path.read_text(), path


def test_only_the_settings_module_reads_settings_from_the_environment() -> None:
    for room in ("jobs", "producer", "worker", "migrations"):
        for path in (ROOT / room).rglob("*.py"):
            if path.name != "settings.py":
                text = path.read_text()
                assert "getenv" not in text, path
                assert 'environ["BATCHMILL' not in text, path
                assert 'environ.get("BATCHMILL' not in text, path


def test_every_python_that_is_started_leaves_the_current_folder_out() -> None:
    started = 0
    for room in ALLOWED:
        for path in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.List) and node.elts and ast.unparse(node.elts[0]) == "sys.executable":
                    started += 1
                    assert ast.unparse(node.elts[1]) == "'-P'", f"{path}:{node.lineno}"
    assert started >= 6, "and they are started in this form"
