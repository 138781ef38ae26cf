"""The code's words: docstrings begin with a verb or a noun, and a class name means one thing."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from tests.support.paths import ROOT

ROOMS = ("jobs", "migrations", "producer", "worker")
QUESTION = re.compile(r"(?:What|Who|Whose|Whom|Whether|Where|How|When|Which|Why|Whatever|Whoever)\b")
COMMENT = re.compile(r"\s*#: (.*)")


def files(*rooms: str) -> list[Path]:
    return [path for room in rooms for path in sorted((ROOT / room).rglob("*.py"))]


def questions(text: str) -> Iterator[int]:
    """The lines of the docstrings and of the `#:` comments that begin with a question word."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring is not None and QUESTION.match(docstring):
                yield node.body[0].lineno
    before = ""
    for number, line in enumerate(text.splitlines(), 1):
        begins = COMMENT.match(line)
        if begins and not COMMENT.match(before) and QUESTION.match(begins[1]):
            yield number
        before = line


def class_names(paths: list[Path]) -> dict[str, set[str]]:
    """The files that define a class of a name, whether it is private or not."""
    found: dict[str, set[str]] = defaultdict(set)
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                found[node.name.lstrip("_")].add(str(path))
    return found


def test_docstrings_begin_with_a_verb_or_a_noun() -> None:
    paths = files(*ROOMS, "tests")
    assert len(paths) > 600
    assert [f"{path}:{line}" for path in paths for line in questions(path.read_text())] == []


def test_a_class_name_means_one_thing() -> None:
    found = class_names(files(*ROOMS))
    assert len(found) > 350
    assert {name: where for name, where in found.items() if len(where) > 1} == {}


def test_offenders_are_found(tmp_path: Path) -> None:
    text = '"""Whether it is."""\n\n#: Who does.\n#: What follows.\na = 1\n\n\nclass A:\n    """How."""\n'
    assert list(questions(text)) == [1, 9, 3]
    for name, code in (("a", "class Thing: ..."), ("b", "class _Thing: ...")):
        (tmp_path / f"{name}.py").write_text(code)
    assert class_names(list(tmp_path.iterdir())) == {"Thing": {f"{tmp_path}/a.py", f"{tmp_path}/b.py"}}
