"""The command line: help and an example for every command, JSON where it is promised, the README true to it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from producer import cli_jobs, cli_submit
from producer.cli import cli
from worker.__main__ import COMMANDS

ROOT = Path(__file__).parent.parent
OF_THE_WORKERS_ROOM = {"worker": "worker.cli", **COMMANDS}
READING = ["status", "jobs", "workers", "wait", "doctor", "db current", "db check"]


def commands() -> dict[str, click.Command]:
    """Every command by the words that call it."""

    def walk(command: click.Command, words: str) -> Iterator[tuple[str, click.Command]]:
        if isinstance(command, click.Group):
            for name, each in command.commands.items():
                yield from walk(each, f"{words} {name}".strip())
        else:
            yield words, command

    for each in (*cli_submit.COMMANDS, *cli_jobs.COMMANDS):
        cli.add_command(each)
    theirs = {name: import_module(module).main for name, module in OF_THE_WORKERS_ROOM.items()}
    own = {words: each for words, each in walk(cli, "") if words not in theirs}
    return own | dict(pair for name, each in theirs.items() for pair in walk(each, name))


@pytest.mark.parametrize("words", commands())
def test_every_command_has_help_and_an_example(words: str) -> None:
    command = commands()[words]
    text = CliRunner().invoke(command, ["--help"]).output
    assert command.help, words
    assert re.search(r"Example: .*batchmill", text), words
    for parameter in command.params:
        if isinstance(parameter, click.Option) and not parameter.hidden:
            assert parameter.help, f"{words} {parameter.opts}"


@pytest.mark.parametrize("words", READING)
def test_every_reading_command_has_json(words: str) -> None:
    assert any("--json" in parameter.opts for parameter in commands()[words].params)


@pytest.mark.parametrize("words", commands())
def test_every_command_stands_in_the_readme(words: str) -> None:
    assert f"batchmill {words}" in (ROOT / "README.md").read_text()


def test_the_modules_work_without_the_installed_script() -> None:
    for module, word in (("producer", "submit"), ("worker", "--device")):
        command = [sys.executable, "-m", module, "--help"]
        assert word in subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout


def test_worker_help_comes_from_the_workers_room() -> None:
    command = [sys.executable, "-m", "producer", "worker", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert "--exit-when-idle" in done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["submit", "no-such-file.jsonl", "-m", "echo"], "no-such-file.jsonl"),
        (["submit", ".", "-m", "echo"], "folder"),
        (["submit", "x.jsonl", "-m", "./no-such-model"], "--remote-path"),
        (["submit", "x.jsonl", "-m", "echo", "--batch-size", "0"], "batch-size"),
        (["submit", "x.jsonl", "-m", "echo", "--temperature", "-1"], "temperature"),
        (["run", "x.jsonl", "-m", "demo", "-q", "nf5"], "nf4, fp4, int8, none"),
        (["status", "--colour"], "--colour"),
        (["run", "x.jsonl", "-m", "echo", "--engine", "fast"], "--engine"),
        (["up", "-m", "echo", "--max-rows", "0"], "--max-rows"),
        (["worker", "-m", "echo", "--gpu-memory-fraction", "1.5"], "--gpu-memory-fraction"),
        (["worker", "-m", "echo", "--device", "tpu"], "unknown device 'tpu'"),
        (["worker", "-m", "demo", "--devices", "0+1,1+2"], "--devices takes different devices"),
        (["worker", "-m", "demo", "--device", "cpu", "--max-memory", "cpu=lots"], "--max-memory cpu"),
        (["worker", "-m", "echo", "--max-memory", "cpu=1GiB"], "the echo engine holds no weights"),
        (["worker", "-m", "echo", "--dequantize", "sometimes", "--context", "many"], "--dequantize"),
    ],
)
def test_bad_usage_is_exit_2_without_a_traceback(words: list[str], said: str, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"prompt": "x"}\n')
    command = [sys.executable, "-m", "producer", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environ(tmp_path))
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        ("BATCHMILL_DATABASE_URL", "postgresql://mill:hunter2@127.0.0.1:1/mill", 1),
        ("BATCHMILL_DATABASE_URL", "mysql://mill:hunter2@127.0.0.1/mill", 2),
        ("BATCHMILL_LEASE_SECONDS", "soon", 2),
    ],
)
def test_trouble_with_settings_and_store_is_one_line_without_secrets(
    name: str, value: str, code: int, tmp_path: Path
) -> None:
    for words in (["status"], ["doctor"], ["db", "upgrade"]):
        command = [sys.executable, "-m", "producer", *words]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env=environ(tmp_path) | {name: value}
        )
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        assert "hunter2" not in done.stderr + done.stdout


def test_starting_the_command_is_quick_because_it_loads_little() -> None:
    heavy = ("sqlalchemy", "celery", "pydantic", "torch")
    code = f"import sys, producer.cli; print(*[name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == ""


def environ(home: Path) -> dict[str, str]:
    return {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "BATCHMILL_HOME": str(home / "home")}
