"""Unit tests stand where their source stands: a reader of one finds the other by its name."""

from __future__ import annotations

from pathlib import Path

from tests.support.paths import ROOT

UNIT = ROOT / "tests" / "unit"


def astray(unit: Path, source: Path) -> list[str]:
    """The test files without a source file of their name, as paths within `unit`.

    `worker/loop/test_spool.py` is about `worker/loop/spool.py`; an aspect may follow, as in `test_spool_locks.py`.
    """
    return [
        str(path.relative_to(unit))
        for path in sorted(unit.rglob("test_*.py"))
        if not _of_a_source_file(path, source / path.relative_to(unit).parent)
    ]


def _of_a_source_file(test: Path, folder: Path) -> bool:
    words = test.stem.removeprefix("test_").split("_")
    return any((folder / f"{'_'.join(words[:count])}.py").is_file() for count in range(1, len(words) + 1))


def test_each_unit_test_is_named_after_a_source_file() -> None:
    assert len(list(UNIT.rglob("test_*.py"))) > 90
    assert astray(UNIT, ROOT) == []


def test_a_file_astray_is_found(tmp_path: Path) -> None:
    for name in ("unit/room/test_noun.py", "unit/room/test_noun_twice.py", "unit/room/test_verb.py", "room/noun.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert astray(tmp_path / "unit", tmp_path) == ["room/test_verb.py"]
