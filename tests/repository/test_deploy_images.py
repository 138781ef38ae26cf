"""deploy/*.Dockerfile, as far as no container engine is needed to check them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.support.deploy import DEPLOY, DOCKERFILES, PROJECT, copied, instructions, last_of
from tests.support.paths import ROOT
from tests.support.processes.wheel import build_wheel


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_an_image_starts_batchmill_itself_so_that_signals_arrive(dockerfile: str) -> None:
    (script,) = json.loads(last_of(dockerfile, "ENTRYPOINT"))
    assert script in PROJECT["scripts"]
    assert last_of(dockerfile, "STOPSIGNAL") == "SIGTERM"
    assert [name for name, _ in instructions(dockerfile)].count("FROM") == 2


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_what_an_image_copies_exists_and_reaches_its_build(dockerfile: str) -> None:
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    lines = [line for line in ignore if not line.startswith("#")]
    assert lines[0] == "*", "nothing else is sent to the build, least of all an .env"
    let_through = {line.removeprefix("!") for line in lines if line.startswith("!")}
    assert set(copied(dockerfile)) == let_through
    for source in copied(dockerfile):
        assert (ROOT / source).exists(), source


def test_a_wheel_can_be_built_from_what_images_copy(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in copied(DOCKERFILES[0]):  # both copy what .dockerignore lets through
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    wheel = build_wheel(source, tmp_path / "wheels")
    assert wheel.match(f"batchmill-{PROJECT['version']}-*.whl"), "what the install line of the Dockerfile looks for"


@pytest.mark.parametrize(
    ("name", "extras"),
    [
        ("producer.Dockerfile", {"postgres"}),
        ("worker.Dockerfile", {"worker", "postgres"}),
        ("README.md", {"worker", "postgres"}),
    ],
)
def test_what_is_installed_has_the_extras_it_needs_and_no_more(name: str, extras: set[str]) -> None:
    written = re.findall(r"(?:batchmill|'\.)\[([\w,]+)\]", (DEPLOY / name).read_text())
    assert {extra for group in written for extra in group.split(",")} == extras
    assert extras <= set(PROJECT["optional-dependencies"])


def test_torch_comes_with_the_worker_extra_alone() -> None:
    extras = PROJECT["optional-dependencies"]
    torch = [name for name, needs in extras.items() if any(need.startswith("torch") for need in needs)]
    assert torch == ["worker"]
    assert not any(need.startswith("torch") for need in PROJECT["dependencies"])


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_everything_that_an_image_installs_is_pinned(dockerfile: str) -> None:
    installs = [
        part
        for instruction, rest in instructions(dockerfile)
        if instruction == "RUN"
        for part in rest.split("&&")
        if re.search(r"\bpip\b.* install\b", part)
    ]
    assert len(installs) == 2
    for part in installs:
        assert "--constraint constraints.txt" in part
    assert re.search(r"^setuptools==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
