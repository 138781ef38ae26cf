"""The README is true: its file tree is the repository's, its settings are the settings, its links lead somewhere."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from batchmill.jobs.configuration.settings import Settings
from tests import tree

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_file_tree_is_the_repositorys() -> None:
    assert f"```\n{tree.render()}\n```" in README, "run `python -m tests.tree` and put its output into the README"


def test_every_file_of_the_tree_says_what_it_is() -> None:
    for line in tree.render().splitlines():
        path, _, note = line.strip().partition(" ")
        assert note.strip() or path.endswith("/"), f"{path} has no docstring"


def test_every_top_level_entry_is_in_the_tree_or_explains_itself() -> None:
    explains_itself = {"README.md", "CHANGELOG.md", "LICENSE", "SECURITY.md"}
    named = f"\n{tree.render()}"
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    for path in listed.stdout.splitlines():
        top, slash, _ = path.partition("/")
        assert top.startswith(".") or top in explains_itself or f"\n{top}{slash}" in named, path


def test_every_setting_stands_in_the_readme_with_its_default() -> None:
    for name, each in Settings.model_fields.items():
        row = re.search(rf"^\| `{name}` \| (.*?) \| (.+) \|$", README, re.MULTILINE)
        assert row, name
        if isinstance(each.default, float):
            assert float(row[1].replace(",", "")) == each.default, name


def test_links_lead_to_files_that_are_there() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_nothing_was_left_to_fill_in() -> None:
    assert "@@" not in README


def test_every_promise_names_a_test_that_is_there() -> None:
    promises = re.findall(r"\| \[(test_\w+)\]\((tests/[\w/]+\.py)\) \|$", README, re.MULTILINE)
    assert len(promises) > 20
    for name, path in promises:
        assert f"def {name}(" in (ROOT / path).read_text(), name
