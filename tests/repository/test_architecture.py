"""The arrows between the rooms, and what importing them costs."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from tests.support.paths import ROOT

#: The other rooms that each room may import. `migrations` opens stores for the entry points of both sides.
ALLOWED = {
    "jobs": set(),
    "migrations": {"jobs"},
    "producer": {"jobs", "migrations"},
    "worker": {"jobs", "migrations"},
}
#: A module's name, with what of it is meant, and one that code in a string imports.
_DOTTED = re.compile(r"([a-z_]+\.[a-z_]+)(?:\.\w+)*(?::\w+)?")
_IMPORTED = re.compile(r"(?<!batchmill )\b(?:from|import) ([a-z_]+(?:\.[a-z_]+)*)")
HEAVY = ("torch", "transformers", "bitsandbytes", "accelerate", "peft")


def imported_rooms(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {room for room in ALLOWED if any(f"{name}.".startswith(f"batchmill.{room}.") for name in names)}


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_point_one_way(room: str) -> None:
    for path in (ROOT / room).rglob("*.py"):
        forbidden = imported_rooms(path) - ALLOWED[room] - {room}
        assert not forbidden, f"{path} imports {forbidden}"


#: They start in every process of batchmill but the one that holds the model.
LIGHT = (
    "batchmill.producer.cli.main",
    "batchmill.producer.cli.local.run",
    "batchmill.producer.cli.local.up",
    "batchmill.producer.submit",
    "batchmill.producer.files.export",
    "batchmill.producer.views.diagnosis.verdict",
    "batchmill.jobs.store",
    "batchmill.jobs.broker.client",
    "batchmill.jobs.broker.embedded",
    "batchmill.migrations",
    "batchmill.worker.cli.worker",
    "batchmill.worker.process.parent",
    "batchmill.worker.process.maintenance.keeper",
    "batchmill.worker.process.app",
    "batchmill.worker.process.supervisor",
)


@pytest.fixture(scope="module")
def heavy_imports() -> dict[str, list[str]]:
    """The heavy packages that each of LIGHT was the first to import, in one process."""
    code = (
        "import importlib, json, sys\n"
        "found, seen = {}, set()\n"
        f"for module in {LIGHT!r}:\n"
        "    importlib.import_module(module)\n"
        f"    found[module] = [name for name in {HEAVY!r} if name in sys.modules and name not in seen]\n"
        "    seen.update(found[module])\n"
        "print(json.dumps(found))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    heavy: dict[str, list[str]] = json.loads(done.stdout)
    return heavy


@pytest.mark.xdist_group("light modules")
@pytest.mark.parametrize("module", LIGHT)
def test_these_load_no_torch(module: str, heavy_imports: dict[str, list[str]]) -> None:
    assert heavy_imports[module] == []


def bare_names(code: str) -> list[str]:
    """The places of a module that name a room without its package, by an import or in a string, as `line 3: jobs.x`."""
    tree = ast.parse(code)
    said = docstrings(tree)
    found = []
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in said:
            dotted = _DOTTED.fullmatch(node.value)
            names = [dotted[0]] if dotted and is_module(dotted[1]) else _IMPORTED.findall(node.value)
        elif isinstance(node, ast.List):
            words = [each.value if isinstance(each, ast.Constant) else None for each in node.elts]
            python = "sys.executable" in map(ast.unparse, node.elts)
            names = [str(word) for option, word in pairwise(words) if python and option == "-m"][:1]
        elif isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "module":
            names = [node.value.value] if isinstance(node.value, ast.Constant) else []
        found += [f"line {node.lineno}: {name}" for name in names if name.split(".")[0] in ALLOWED]
    return found


def docstrings(tree: ast.Module) -> set[ast.expr]:
    bodies = [node.body for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]
    return {body[0].value for body in bodies if body and isinstance(body[0], ast.Expr)}


def is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").exists()


@pytest.mark.parametrize(
    "code",
    [
        "import jobs",
        "from worker.cli import main",
        'a = "worker.engine"',
        'a = "jobs.broker.message_filter:T"',
        "a = 'import worker.engine'",
        'a = [sys.executable, "-m", "worker", "-m", "echo"]',
        'module: str = "producer"',
    ],
)
def test_a_room_without_its_package_is_found(code: str) -> None:
    assert len(bare_names(f'"""It says import jobs."""\nimport os\n{code}\nfrom batchmill.jobs import store\n')) == 1


def test_no_room_is_named_without_its_package() -> None:
    """It would be imported from a checkout a second time, under a second name."""
    paths = [path for folder in (*ALLOWED, "src", "tests") for path in (ROOT / folder).rglob("*.py")]
    assert len(paths) > 400
    found = {path: bare_names(path.read_text()) for path in paths if path != Path(__file__)}
    assert not {path: names for path, names in found.items() if names}


def test_click_is_known_to_the_command_lines_alone() -> None:
    for path in (*(ROOT / "jobs").rglob("*.py"), *(ROOT / "producer").rglob("*.py")):
        if ROOT / "producer/cli" not in path.parents:
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
