"""Completion in real shells: every command, options of those that are another process, ids of jobs, files."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

from batchmill.jobs.store.store import Store
from batchmill.producer.cli.commands import ENTRIES
from batchmill.producer.cli.completion import complete_job
from batchmill.producer.cli.main import cli
from tests.support.paths import ROOT
from tests.support.processes.terminal import Terminal
from tests.support.store import mill

#: The arguments that start each shell with nobody's configuration.
SHELLS = {"bash": ["--norc", "--noprofile", "-i"], "zsh": ["-f", "-i"]}
BEFORE = {"bash": "", "zsh": "autoload -U compinit; compinit -u -D; "}


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """A home, and a `batchmill` on the path that is this checkout's."""
    command = tmp_path / "bin" / "batchmill"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m batchmill "$@"\n')
    command.chmod(0o755)
    return {
        "PATH": f"{command.parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT / "src"),
        "BATCHMILL_HOME": str(tmp_path / "home"),
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HOME": str(tmp_path),
    }


@pytest.fixture
def job_id(environ: dict[str, str], tmp_path: Path) -> str:
    prompts = tmp_path / "prompts of today.jsonl"
    prompts.write_text('{"prompt": "x"}\n')
    done = subprocess.run(["batchmill", "submit", prompts, "-m", "echo"], env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def script(shell: str, environ: dict[str, str], folder: Path) -> Path:
    """The file that the guide to jobs says to source."""
    made = subprocess.run(
        ["batchmill"], env={**environ, "_BATCHMILL_COMPLETE": f"{shell}_source"}, capture_output=True, check=True
    )
    path = folder / f"completion.{shell}"
    path.write_bytes(made.stdout)
    return path


@pytest.mark.parametrize("shell", SHELLS)
def test_the_tab_key_completes_commands_options_ids_and_files(
    shell: str, environ: dict[str, str], job_id: str, tmp_path: Path
) -> None:
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"{shell} is not installed here")
    typed = [
        ("batchmill canc", "cancel"),
        ("batchmill db curr", "current"),
        ("batchmill models quan", "quantize"),
        (f"batchmill cancel {job_id[:4]}", job_id),
        ("batchmill status la", "last"),
        (f"batchmill submit {tmp_path}/prom", "today.jsonl"),
        ("batchmill worker -m de", "demo"),
    ]
    with Terminal([program, *SHELLS[shell]], env=environ, columns=200) as terminal:
        terminal.press(f"{BEFORE[shell]}. {script(shell, environ, tmp_path)}; PS1='read''y> '\n")
        for line, completed in typed:
            terminal.until("ready> ")
            terminal.shown = ""
            terminal.press(f"{line}\t")
            terminal.until(completed)
            terminal.shown = ""
            terminal.press("\x15\n")  # nothing of the line is run


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed here")
def test_fish_completes_the_same(environ: dict[str, str], job_id: str, tmp_path: Path) -> None:
    def offered(line: str) -> list[str]:
        code = f"source {script('fish', environ, tmp_path)}; complete -C '{line}'"
        done = subprocess.run(["fish", "--no-config", "-c", code], env=environ, capture_output=True, text=True)
        return [each.split("\t")[0] for each in done.stdout.splitlines()]

    assert set(offered("batchmill ")) == set(ENTRIES)
    assert offered("batchmill models ") == ["pull", "quantize"]
    assert offered("batchmill plan --gpu-m") == ["--gpu-memory"]
    assert set(offered("batchmill results ")) == {job_id, "last"}


class TestIds:
    """Completions of a JOB argument."""

    @pytest.fixture(autouse=True)
    def the_store_is_the_settings(self, store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("BATCHMILL_DATABASE_URL", store_url)

    def offered(self, incomplete: str = "") -> dict[str, str]:
        completions = complete_job(click.Context(cli), click.Argument(["job"]), incomplete)
        return {each.value: str(each.help) for each in completions}

    def test_last_is_first_and_the_others_have_state_and_name(self, store: Store) -> None:
        old, new = (mill.load(store, 1, name=name) for name in ("old", "new"))
        offered = self.offered()
        assert next(iter(offered)) == "last"
        assert offered == {"last": "the newest job", old: "queued echo (none) old", new: "queued echo (none) new"}

    def test_only_what_begins_so(self, store: Store) -> None:
        job_id = mill.load(store, 1)
        assert set(self.offered(job_id[:5].upper())) == {job_id}
        assert self.offered("no-such") == {}

    def test_a_name_is_a_line_of_text(self, store: Store) -> None:
        mill.load(store, 1, name="a\nplain,b\x1b[2J")
        assert all(told.isprintable() for told in self.offered().values())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("BATCHMILL_HOME", "none"),
        ("BATCHMILL_DATABASE_URL", "postgresql://mill:hunter2@127.0.0.1:1/mill"),
        ("BATCHMILL_LEASE_SECONDS", "soon"),
    ],
)
def test_nothing_is_made_or_said_where_jobs_cannot_be_looked_up(
    name: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(name, value)
    assert complete_job(click.Context(cli), click.Argument(["job"]), "") == []
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []
