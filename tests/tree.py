"""The annotated file tree of the README; `python -m tests.tree` prints it.

A module's note is the beginning of its docstring.
"""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROOMS = ("jobs", "producer", "worker", "migrations")
#: What is no Python module, or is told of as a whole.
NOTES = {
    "src/": "the import package: its command, and links to the four rooms",
    "worker/demo/model/": "the demo model's weights, tokenizer and chat template",
    "migrations/script.py.mako": "what a new migration looks like",
    "migrations/versions/": "the migrations, one file each",
    "tests/": "test_<module>.py; integration/, faults/: real processes; gpu/: a device; bench/, mutants/, soak/",
    "examples/": "prompt files to try",
    "deploy/": "compose file, Dockerfiles, systemd unit",
    "Makefile": "every target does its own set-up",
    "pyproject.toml": "the package, its extras, and the settings of the tools",
    "constraints.txt": "the versions that make installs",
}


def render() -> str:
    lines: list[str] = []
    for room in ROOMS:
        lines += [f"{room}/", *(_line(path, note) for path, note in _files(room))]
    lines += [f"{path:<28} {note}" for path, note in NOTES.items() if not path.startswith(ROOMS)]
    return "\n".join(lines)


def _files(room: str) -> list[tuple[str, str]]:
    listed = subprocess.run(["git", "ls-files", room], cwd=ROOT, capture_output=True, text=True, check=True)
    found: dict[str, str] = {}
    for path in listed.stdout.splitlines():
        whole = next((each for each in NOTES if path.startswith(each)), None)
        if whole is not None:
            found[whole] = NOTES[whole]
        else:
            found[path] = _note(ROOT / path)
    return sorted(found.items())


def _note(path: Path) -> str:
    """The first sentence of a module's docstring, in one line."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    first = re.split(r"(?<=[.!?])\s|\n\n|;\s", text.strip(), maxsplit=1)[0]
    return " ".join(first.split()).rstrip(".")


def _line(path: str, note: str) -> str:
    return f"  {path.partition('/')[2]:<26} {note}"


if __name__ == "__main__":
    print(render())  # noqa: T201
