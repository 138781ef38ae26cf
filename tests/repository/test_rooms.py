"""The rooms of the source: arrows between modules run without cycles and from floor to floor, folders stay small."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.support.paths import ROOT

ROOMS = ("jobs", "migrations", "producer", "worker")
#: The rooms of a room, from the lowest: each imports from those before it alone.
FLOORS = {
    "worker": ("devices", "models", "engine", "plan", "loop", "evaluate", "process", "cli"),
    "jobs": ("errors", "runtime", "requests", "models", "configuration", "broker", "store", "advice"),
    "jobs/store": (
        "columns",
        "tables",
        "database",
        "bounds",
        "workers",
        "own_id",
        "jobs",
        "leases",
        "views",
        "checking",
        "store",
    ),
    "producer": ("requests", "files", "submission", "submit", "reconcile_once", "views", "cli"),
}
#: Modules that belong to no floor.
APART = {"worker": {"__main__", "demo"}}
MOST_ENTRIES = 14
#: The sub-rooms that modules outside of their parent room may import from; all others are for their parent alone.
PUBLIC = {
    "jobs/broker",
    "jobs/configuration",
    "jobs/models",
    "jobs/requests",
    "jobs/runtime",
    "jobs/runtime/files",
    "jobs/runtime/process",
    "jobs/store",
    "jobs/store/database",
    "jobs/store/jobs",
    "jobs/store/leases",
    "jobs/store/views",
    "jobs/store/workers",
    "producer/views/diagnosis",
    "worker/engine/continuous",
    "worker/engine/continuous/weights",
    "worker/engine/generate",
    "worker/engine/text",
    "worker/evaluate/data",
    "worker/evaluate/measures",
    "worker/evaluate/report",
    "worker/models/adapters",
    "worker/models/hub",
    "worker/models/loaded",
    "worker/models/quantization",
}


def modules(root: Path = ROOT) -> dict[str, Path]:
    """The source's modules by name: `{"batchmill.jobs.store": jobs/store/__init__.py}`."""
    paths = [path for room in ROOMS for path in (root / room).rglob("*.py")]
    return {_name(path.relative_to(root)): path for path in paths}


def _name(path: Path) -> str:
    return ".".join(("batchmill", *path.with_suffix("").parts)).removesuffix(".__init__")


def arrows(found: Mapping[str, Path]) -> dict[str, set[str]]:
    """The modules that each imports, also within its functions and for types alone."""
    return {name: set(_imported(path, found)) - {name} for name, path in found.items()}


def _imported(path: Path, found: Mapping[str, Path]) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module]
        for name in names:
            if name in found:
                yield name


def cycle(graph: Mapping[str, set[str]]) -> list[str]:
    """The modules of one cycle; none where there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def climbs(graph: Mapping[str, set[str]]) -> list[str]:
    """The imports that point from a floor of a room to a higher one."""
    return [
        f"{name} imports {other}"
        for room in FLOORS
        for name, others in graph.items()
        for other in others
        if (mine := _floor(room, name)) is not None and (theirs := _floor(room, other)) is not None and theirs > mine
    ]


def _floor(room: str, name: str) -> int | None:
    """The floor of a room on which a module stands; None for those of other rooms."""
    prefix = _prefix(room)
    inner = name.removeprefix(prefix).split(".")[0]
    return FLOORS[room].index(inner) if name.startswith(prefix) and inner in FLOORS[room] else None


def _prefix(room: str) -> str:
    return f"batchmill.{room.replace('/', '.')}."


def entered(graph: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """The sub-rooms, and the private modules, that are imported from outside of their parent room, with who does so."""
    found: dict[str, set[str]] = defaultdict(set)
    for name, others in graph.items():
        for other in others:
            parts = other.split(".")
            for depth in range(3, len(parts) + 1):
                parent, room = ".".join(parts[: depth - 1]), "/".join(parts[1:depth])
                is_room = depth < len(parts) or parts[-1].startswith("_")
                if is_room and not f"{name}.".startswith(f"{parent}."):
                    found[room].add(name)
    return found


def entries(folder: Path) -> int:
    return sum(each.name not in ("__init__.py", "__pycache__") for each in folder.iterdir())


def test_no_modules_import_each_other_in_a_cycle() -> None:
    found = modules()
    assert len(found) > 250
    assert cycle(arrows(found)) == []


@pytest.mark.parametrize("room", FLOORS)
def test_each_module_of_a_room_stands_on_a_floor(room: str) -> None:
    prefix = _prefix(room)
    inner = {name.removeprefix(prefix).split(".")[0] for name in modules() if name.startswith(prefix)}
    assert inner == {*FLOORS[room]} | APART.get(room, set())


def test_rooms_import_from_lower_floors_alone() -> None:
    assert climbs(arrows(modules())) == []


def test_no_folder_has_more_entries_than_one_looks_over() -> None:
    folders = {path.parent for path in modules().values()}
    assert not {str(each): entries(each) for each in folders if entries(each) > MOST_ENTRIES}


def test_private_rooms_and_files_are_imported_by_their_parent_alone() -> None:
    used = entered(arrows(modules()))
    assert {room: sorted(who) for room, who in used.items() if room not in PUBLIC} == {}
    assert PUBLIC - used.keys() == set(), "listed, and used by nobody"


@pytest.mark.parametrize(
    "late",
    [
        "import batchmill.worker.loop.a",
        "def f():\n    from batchmill.worker.loop import a",
        "from batchmill.worker.loop.a import x",
    ],
)
def test_an_offender_is_found(tmp_path: Path, late: str) -> None:
    for room, code in (("devices", late), ("loop", "from batchmill.worker.devices import a")):
        (tmp_path / "worker" / room).mkdir(parents=True)
        (tmp_path / "worker" / room / "a.py").write_text(code)
    graph = arrows(modules(tmp_path))
    assert set(cycle(graph)) == {"batchmill.worker.devices.a", "batchmill.worker.loop.a"}
    assert climbs(graph) == ["batchmill.worker.devices.a imports batchmill.worker.loop.a"]


def test_an_intruder_is_found(tmp_path: Path) -> None:
    for file, code in (
        ("producer/cli/a.py", "from batchmill.worker.loop.inner import b\nfrom batchmill.worker.loop import _own"),
        ("worker/loop/inner/b.py", ""),
        ("worker/loop/_own.py", "from batchmill.worker.loop.inner import b"),
    ):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(code)
    intruder = {"batchmill.producer.cli.a"}
    assert entered(arrows(modules(tmp_path))) == {
        "worker/loop": intruder,
        "worker/loop/inner": intruder,
        "worker/loop/_own": intruder,
    }
