"""The command line: help and an example for every command, JSON where it is promised, the pages true to it."""

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

from batchmill.producer.cli.commands import ENTRIES
from batchmill.producer.cli.main import cli
from batchmill.worker.__main__ import MODULES
from tests.support.paths import ROOT
from tests.support.processes import forked

READING = ["status", "jobs", "workers", "wait", "doctor", "db current", "db check"]


def commands() -> dict[str, click.Command]:
    """Every command by the words that call it."""

    def walk(command: click.Command, words: str) -> Iterator[tuple[str, click.Command]]:
        if isinstance(command, click.Group):
            context = click.Context(command)
            for name in command.list_commands(context):
                each = command.get_command(context, name)
                assert each is not None
                yield from walk(each, f"{words} {name}".strip())
        else:
            yield words, command

    theirs = {name: import_module(module).main for name, module in MODULES.items()}
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


@pytest.mark.parametrize("words", commands())
def test_an_example_is_one_line_in_any_terminal(words: str) -> None:
    text = CliRunner().invoke(commands()[words], ["--help"], env={"COLUMNS": "40"}).output
    assert f"\n  {commands()[words].epilog}\n" in text


@pytest.mark.parametrize("group", [["db"], ["models"], []])
def test_every_group_of_commands_has_an_example_and_whole_summaries(group: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "batchmill", *group, "-h"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert re.search(r"^  Example: batchmill \w+", done.stdout, re.MULTILINE)
    assert done.stdout.count("...\n") == 1, "that of the usage line: no summary is cut short"


def options(command: click.Command) -> set[str]:
    return {str(each.name) for each in command.params if isinstance(each, click.Option) and not each.hidden}


def grouped() -> dict[str, dict[str, tuple[str, ...]]]:
    """The groups of options of each command that has some."""
    return {words: dict(each.groups) for words, each in commands().items() if getattr(each, "groups", None)}


def test_commands_of_many_options_have_them_in_groups() -> None:
    many = {words for words, command in commands().items() if len(options(command)) > 5}
    assert many <= set(grouped())
    assert {"run", "submit", "up", "worker", "plan", "evaluate"} <= set(grouped())


@pytest.mark.parametrize("words", grouped())
def test_a_group_holds_what_its_command_has(words: str) -> None:
    command, groups = commands()[words], grouped()[words]
    named = [name for names in groups.values() for name in names]
    assert len(named) == len(set(named))
    assert options(command) - set(named) <= {"as_json", "output"}
    text = CliRunner().invoke(command, ["--help"]).output
    sections = re.findall(r"^(\w+):$", text, re.MULTILINE)
    assert sections == [*groups, "Options"]


def test_no_group_names_an_option_that_no_command_has() -> None:
    everywhere = set().union(*(options(each) for each in commands().values()))
    assert {name for groups in grouped().values() for names in groups.values() for name in names} <= everywhere


@pytest.mark.parametrize("words", READING)
def test_every_reading_command_has_json(words: str) -> None:
    assert any("--json" in parameter.opts for parameter in commands()[words].params)


@pytest.mark.parametrize("words", commands())
def test_every_command_stands_in_the_guide_and_in_the_reference(words: str) -> None:
    assert f"batchmill {words}" in (ROOT / "docs/guides/jobs.md").read_text()
    assert f"## `batchmill {words}`\n" in (ROOT / "docs/reference/cli.md").read_text()


def test_the_modules_work_without_the_installed_script() -> None:
    for module, word in (("batchmill", "submit"), ("batchmill.worker", "--device")):
        command = [sys.executable, "-m", module, "--help"]
        assert word in subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout


def test_worker_help_comes_from_the_workers_room() -> None:
    command = [sys.executable, "-m", "batchmill", "worker", "--help"]
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
        (["stats"], "No such command 'stats'. Did you mean 'status'?"),
        (["frobnicate"], "No such command 'frobnicate'.\n"),
        (["plan"], "name one model: as MODEL, or by -m"),
        (["plan", "demo", "-m", "demo"], "name one model: as MODEL, or by -m"),
        (["plan", "-m", "dmeo"], "did you mean demo?"),
        (["evaluate", "dmeo", "--data", "x.jsonl"], "did you mean demo?"),
        (["models", "quantize", "dmeo", "copy", "-q", "nf4"], "did you mean demo?"),
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
    done = forked.finished(words, folder=tmp_path, env=environ(tmp_path))
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
        done = forked.finished(words, folder=tmp_path, env=environ(tmp_path) | {name: value})
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        assert "hunter2" not in done.stderr + done.stdout


@pytest.mark.parametrize(
    ("words", "left_out"),
    [
        (["--help"], {"pydantic", "sqlalchemy", "celery", "rich", "structlog", "torch"}),
        (["status"], {"celery", "alembic", "torch", "rich", "redis", "structlog", "sqlalchemy.dialects.postgresql"}),
        (["jobs"], {"celery", "alembic", "torch", "rich", "redis", "structlog", "sqlalchemy.dialects.postgresql"}),
    ],
)
def test_a_command_imports_only_what_it_needs(words: list[str], left_out: set[str], tmp_path: Path) -> None:
    prompts = tmp_path / "x.jsonl"
    prompts.write_text('{"prompt": "x"}\n')
    submit = [sys.executable, "-m", "batchmill", "submit", str(prompts), "-m", "echo"]
    subprocess.run(submit, env=environ(tmp_path), capture_output=True, check=True)
    code = (
        "import atexit, sys; atexit.register(lambda: print(*sys.modules, file=sys.stderr)); "
        f"sys.argv = ['batchmill', *{words}]; from batchmill.__main__ import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ(tmp_path), capture_output=True, text=True, check=True
    )
    assert done.stdout
    assert "batchmill.jobs" in done.stderr.split(), "the modules are listed"
    assert left_out & set(done.stderr.split()) == set()


@pytest.mark.parametrize("name", MODULES)
def test_usage_lines_of_the_workers_room_name_batchmill(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "batchmill", name, "-h"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.startswith(f"Usage: batchmill {name} ")


def test_the_roots_help_lists_every_command_in_the_order_of_work() -> None:
    text = CliRunner().invoke(cli, ["-h"]).output
    listed = re.findall(r"^  (\w+)  +[A-Z]", text, re.MULTILINE)
    assert listed == list(ENTRIES)
    assert "Example: batchmill run" in text


def test_every_command_of_the_producer_can_be_called() -> None:
    modules = {entry.module for entry in ENTRIES.values()} - {"worker"}
    for module in modules:
        theirs = {str(each.name) for each in import_module(module).COMMANDS}
        assert theirs == {name for name, entry in ENTRIES.items() if entry.module == module}, module
    assert {name for name, entry in ENTRIES.items() if entry.module == "worker"} == set(MODULES)


def environ(home: Path) -> dict[str, str]:
    return {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT / "src"), "BATCHMILL_HOME": str(home / "home")}
