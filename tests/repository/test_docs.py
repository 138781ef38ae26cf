"""The README and the pages of docs/ are true: generated ones are current, links lead somewhere, commands are taken."""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import click
import pytest

from batchmill.jobs.configuration.settings import Settings
from batchmill.jobs.requests.request import ErrorCode
from batchmill.producer.cli.commands import ENTRIES
from batchmill.producer.requests.kinds import FORMS
from batchmill.producer.requests.lines import Lines
from docs import generate
from tests.support.paths import ROOT
from tests.support.shown import parsed

README = ROOT / "README.md"
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (README, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md")))
}
RELIABILITY, SETTINGS = PAGES["docs/concepts/reliability.md"], PAGES["docs/reference/settings.md"]
FOLDERS = re.findall(r"^\| `([\w/]+)/` \| (.+) \|$", PAGES["docs/concepts/architecture.md"], re.MULTILINE)
#: Files at the top that need no line.
EXPLAINS_ITSELF = {
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "Makefile",
    "README.md",
    "SECURITY.md",
    "constraints.txt",
    "pyproject.toml",
}
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def tracked(*paths: str) -> list[str]:
    listed = subprocess.run(["git", "ls-files", *paths], cwd=ROOT, capture_output=True, text=True, check=True)
    return listed.stdout.splitlines()


@pytest.mark.parametrize("page", [str(path.relative_to(ROOT)) for path in generate.pages()])
def test_a_page_that_comes_from_the_code_is_current(page: str) -> None:
    assert PAGES[page] == generate.pages()[ROOT / page], "run `make docs-reference`"


def test_each_source_folder_has_a_line_and_no_other() -> None:
    named = [path for path, _ in FOLDERS if path.split("/")[0] in generate.ROOMS]
    assert named == sorted({str(Path(path).parent) for path in tracked(*generate.ROOMS)})


def test_each_folder_with_a_line_is_there_and_says_what_it_is() -> None:
    for path, note in FOLDERS:
        assert (ROOT / path).is_dir(), path
        assert len(note) > 10, path


def test_every_top_level_entry_has_a_line_or_explains_itself() -> None:
    named = {path for path, _ in FOLDERS}
    for top in {path.split("/")[0] for path in tracked()}:
        assert top.startswith(".") or top in EXPLAINS_ITSELF | named, top


def test_every_module_says_what_it_is() -> None:
    for path in tracked(*generate.ROOMS):
        if path.endswith(".py") and (text := (ROOT / path).read_text()):
            assert ast.get_docstring(ast.parse(text)), path


def test_the_readme_is_short() -> None:
    assert len(README.read_bytes()) <= 12 * 1024


def test_every_setting_stands_in_the_reference_with_its_default() -> None:
    for name, each in Settings.model_fields.items():
        row = re.search(rf"^\| `{name}` \| (.*?) \| (.+) \| (.+) \|$", SETTINGS, re.MULTILINE)
        assert row, name
        if isinstance(each.default, float):
            assert float(row[1].replace(",", "")) == each.default, name


def test_every_error_code_is_explained() -> None:
    explained = re.findall(r"^\| `(\w+)` \|", PAGES["docs/reference/codes.md"], re.MULTILINE)
    assert sorted(explained) == sorted(ErrorCode)


def test_every_promise_names_a_test_that_is_there() -> None:
    promises = re.findall(r"\[(test_\w+)\]\(../../(tests/[\w/]+\.py)\)", RELIABILITY)
    assert len(promises) > 40
    rows = re.findall(r"^\| (?!fault|---).*\|$", RELIABILITY, re.MULTILINE)
    assert all("](../../tests/" in row for row in rows)
    for name, path in promises:
        assert f"def {name}(" in (ROOT / path).read_text(), name


def test_the_first_page_lists_every_page() -> None:
    listed = re.findall(r"^- \[.+?\]\((.+?)\)", PAGES["docs/index.md"], re.MULTILINE)
    assert sorted(f"docs/{path}" for path in (*listed, "index.md")) == [*filter(re.compile("docs/").match, PAGES)]


def prose(page: str) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^ *```.*?^ *```$", "", PAGES[page], flags=re.DOTALL | re.MULTILINE)


def anchors(text: str) -> set[str]:
    """The headings of a page as its links name them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_what_is_there(page: str) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", prose(page)):
        path, _, anchor = target.partition("#")
        there = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there.read_text()), target


@pytest.mark.parametrize("page", PAGES)
def test_a_page_names_paths_and_targets_that_are_there(page: str) -> None:
    for path in re.findall(r"`((?:jobs|producer|worker|migrations|tests|docs|deploy|examples)/[\w./-]+)`", prose(page)):
        assert (ROOT / path).exists() or "*" in path, path
    for target in re.findall(r"(?:^\$ |`)make ([a-z-]+)", PAGES[page], re.MULTILINE):
        assert target in TARGETS, target


@pytest.mark.parametrize("page", PAGES)
def test_nothing_was_left_to_fill_in(page: str) -> None:
    assert "@@" not in PAGES[page]


def shown_commands() -> Iterator[tuple[str, list[str]]]:
    """The commands of batchmill in the pages' console blocks, each up to a pipe, a redirection or a comment."""
    for page, text in PAGES.items():
        for block in re.findall(r"^ *```console\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE):
            for line in re.findall(r"^ *\$ ((?:\w+=\S+ )*batchmill .*)$", block, re.MULTILINE):
                lexer = shlex.shlex(line.replace("<TAB>", "last"), posix=True, punctuation_chars="|&;<>")
                lexer.whitespace_split = True
                words = [*lexer]
                ends = [place for place, word in enumerate(words) if set(word) <= set("|&;<>")]
                if arguments := words[words.index("batchmill") + 1 : min(ends, default=len(words))]:
                    yield page, arguments


SHOWN = list(shown_commands())


@pytest.mark.parametrize(("page", "arguments"), SHOWN, ids=[f"{page}: {' '.join(words)}" for page, words in SHOWN])
def test_every_shown_command_is_one_that_batchmill_takes(
    page: str, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with suppress(click.exceptions.Exit):
        parsed(arguments)


def test_the_lines_of_a_prompt_file_that_pages_show_are_taken() -> None:
    shown = [
        line
        for page in ("docs/guides/prompt-files.md", "docs/getting-started/first-file.md")
        for block in re.findall(r"^```(?:json|console)\n(.*?)^```$", PAGES[page], re.DOTALL | re.MULTILINE)
        for line in re.findall(r'^\{.*"(?:prompt|messages)": .*\}$', block, re.MULTILINE)
    ]
    assert len(shown) > 5
    reader = Lines(FORMS.values())
    for index, line in enumerate(shown):
        reader.request(json.loads(line), index, adapter_of=lambda _model, adapter: adapter)


def test_commands_are_found_on_every_kind_of_page() -> None:
    found = {page for page, _ in SHOWN}
    assert {"README.md", "docs/guides/jobs.md", "docs/reference/cli.md", "docs/getting-started/first-file.md"} <= found
    assert set(ENTRIES) <= {arguments[0] for _, arguments in SHOWN}


@pytest.mark.parametrize("page", PAGES)
def test_prose_names_commands_that_there_are(page: str) -> None:
    for line in re.findall(r"`batchmill ([a-z]\w*)", PAGES[page]):
        assert line in ENTRIES, line
