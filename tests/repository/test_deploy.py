"""Command lines, settings and variables in the files of deploy/: batchmill takes every one of them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import click
import pytest

from batchmill.jobs.configuration.settings import PREFIX, Settings, load_settings
from batchmill.jobs.models.spec import ModelSpec
from tests.support.deploy import DEPLOY, SERVICES, VARIABLE, WORKERS, assignments, filled_in, interpolated, unit
from tests.support.shown import parsed


def deploy_files() -> list[Path]:
    return sorted(path for path in DEPLOY.iterdir() if path.is_file())


def compose_commands() -> Iterator[tuple[str, list[str]]]:
    for name, service in SERVICES.items():
        if "build" in service and "command" in service:
            yield f"compose {name}", [interpolated(word, filled_in()) for word in service["command"]]


def unit_commands() -> Iterator[tuple[str, list[str]]]:
    values = assignments("worker.env.example")
    (line,) = unit()["ExecStart"]
    line = re.sub(r"\$\{?(\w+)\}?", lambda found: values[found[1]], line.replace("%i", "0"))
    yield "unit", shlex.split(line)[1:]


def shell_lines() -> list[list[str]]:
    """The commands in the README's blocks, each up to its first redirection."""
    blocks = re.findall(r"^```sh\n(.*?)^```", (DEPLOY / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    return [re.split(r"\0[<>|]\0", "\0".join(words))[0].split("\0") for words in lines if words]


def readme_commands() -> Iterator[tuple[str, list[str]]]:
    for words in shell_lines():
        if words[:3] == ["docker", "compose", "run"] and "producer" in words:
            yield "README", words[words.index("producer") + 1 :]
        for place, word in enumerate(words):
            if word.endswith("/bin/batchmill"):
                yield "README", words[place + 1 :]


def quoted_commands() -> Iterator[tuple[str, list[str]]]:
    """Commands in prose and comments, such as `batchmill workers`."""
    for path in deploy_files():
        for line in re.findall(r"`batchmill ([^`]+)`", path.read_text()):
            words = line.split()
            if len(words) == 1:  # named without what it needs
                words.append("--help")
            yield path.name, words


COMMAND_LINES = [*compose_commands(), *unit_commands(), *readme_commands(), *quoted_commands()]


@pytest.mark.parametrize(("where", "arguments"), COMMAND_LINES, ids=[" ".join([a, *b]) for a, b in COMMAND_LINES])
def test_every_command_line_is_one_that_batchmill_takes(where: str, arguments: list[str]) -> None:
    with suppress(click.exceptions.Exit):  # of --help
        context = parsed(arguments)
        if "quantization" in context.params:
            ModelSpec.parse(context.params["model"], quantization=context.params["quantization"])


def test_command_lines_are_found_in_every_kind_of_file() -> None:
    found = {where: arguments[0] for where, arguments in COMMAND_LINES}
    assert found["compose migrate"] == "db"
    assert {found[f"compose {name}"] for name in WORKERS} == {"worker"} == {found["unit"]}
    assert {arguments[0] for where, arguments in COMMAND_LINES if where == "README"} >= {
        "submit",
        "status",
        "results",
        "workers",
        "db",
    }


@pytest.mark.parametrize("line", ["submit - --modell x", "dbb upgrade", "db downgrade", "worker -m echo --gpu 0"])
def test_a_command_line_that_batchmill_refuses_is_noticed(line: str) -> None:
    with pytest.raises(click.UsageError):
        parsed(line.split())


def test_the_readme_names_services_and_files_that_exist() -> None:
    text = (DEPLOY / "README.md").read_text()
    named = {word for words in shell_lines() if words[:2] == ["docker", "compose"] for word in words[3:]}
    services = {word for word in named if re.match(r"worker-|producer$|migrate$|redis$|postgres$", word)}
    assert {"producer", "migrate", *WORKERS} <= services <= set(SERVICES)
    for name in re.findall(r"\bdeploy/([\w.@-]+)", text):
        assert (DEPLOY / name).is_file(), name


def test_every_setting_named_in_deploy_exists() -> None:
    known = {f"{PREFIX}{name.upper()}" for name in Settings.model_fields}
    named = {name for path in deploy_files() for name in re.findall(rf"{PREFIX}[A-Z0-9_]+", path.read_text())}
    assert {f"{PREFIX}BROKER_URL", f"{PREFIX}DATABASE_URL"} <= named <= known


def containers() -> list[tuple[str, dict[str, str]]]:
    """The services that run batchmill, with their environment."""
    environments = {name: service["environment"] for name, service in SERVICES.items() if "build" in service}
    return [
        (name, {key: interpolated(v, filled_in()) for key, v in each.items()}) for name, each in environments.items()
    ]


@pytest.mark.parametrize(
    "environment",
    [each for _, each in containers()] + [assignments("worker.env.example")],
    ids=[name for name, _ in containers()] + ["unit"],
)
def test_settings_are_accepted_and_name_shared_services(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    settings = load_settings()
    assert not settings.embedded_broker
    assert not settings.embedded_store
    assert ":filled@redis:" in settings.broker_url or ":PASSWORD@" in settings.broker_url
    assert ":filled@postgres:" in settings.database_url or ":PASSWORD@" in settings.database_url


def test_compose_and_its_env_example_name_the_same_variables() -> None:
    used = {found[2] for found in VARIABLE.finditer((DEPLOY / "compose.yaml").read_text()) if found[2]}
    assert used == set(assignments(".env.example"))


def test_passwords_have_to_be_set_and_have_no_default() -> None:
    values = {name: value for name, value in filled_in().items() if "PASSWORD" not in name}
    for found in VARIABLE.finditer((DEPLOY / "compose.yaml").read_text()):
        if found[2] and "PASSWORD" in found[2]:
            assert found[3] == ":?", found[0]
    assert {name for name, value in assignments(".env.example").items() if not value} >= {
        "REDIS_PASSWORD",
        "POSTGRES_PASSWORD",
    }
    with pytest.raises(KeyError, match="REDIS_PASSWORD"):
        interpolated(SERVICES["redis"]["environment"]["REDISCLI_AUTH"], values)
    with pytest.raises(KeyError, match="POSTGRES_PASSWORD"):
        interpolated(SERVICES["postgres"]["environment"]["POSTGRES_PASSWORD"], values)


def test_filled_in_environment_files_are_not_committed() -> None:
    assert ".env" in (DEPLOY / ".gitignore").read_text().splitlines()
