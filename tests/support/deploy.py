"""The files of deploy/, read as compose, a container engine and systemd read them."""

from __future__ import annotations

import re
import tomllib
from typing import Any

import yaml

from tests.support.paths import ROOT

DEPLOY = ROOT / "deploy"
UNIT = DEPLOY / "batchmill-worker@.service"
DOCKERFILES = ("producer.Dockerfile", "worker.Dockerfile")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
WORKERS = sorted(name for name in SERVICES if name.startswith("worker-"))
#: References that compose replaces: `$$`, `$NAME`, `${NAME}`, or `${NAME` with an operator and what follows it.
VARIABLE = re.compile(r"\$(?:(\$)|\{?(\w+)(?:(:?[-?+])([^}]*))?\}?)")


def assignments(name: str) -> dict[str, str]:
    """The NAME=VALUE lines of an environment file; those that are commented out are left out."""
    lines = [line for line in (DEPLOY / name).read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def interpolated(text: str, values: dict[str, str]) -> str:
    """The string as compose interpolates it. An empty or missing variable that is required is a KeyError."""

    def value(found: re.Match[str]) -> str:
        dollar, name, operator, default = found.groups()
        if dollar:
            return "$"
        if values.get(name):
            return values[name]
        if operator in ("-", ":-"):
            return default
        raise KeyError(name)

    return VARIABLE.sub(value, text)


def filled_in() -> dict[str, str]:
    """.env as a user would fill it in."""
    return {name: value or "filled" for name, value in assignments(".env.example").items()}


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile, each as its name and the rest."""
    lines = [line for line in (DEPLOY / dockerfile).read_text().splitlines() if line and not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [(line.split(None, 1)[0], line.split(None, 1)[1].strip()) for line in joined]


def last_of(dockerfile: str, name: str) -> str:
    return [rest for instruction, rest in instructions(dockerfile) if instruction == name][-1]


def copied(dockerfile: str) -> list[str]:
    """The paths of the repository that a Dockerfile copies."""
    copies = [rest.split() for name, rest in instructions(dockerfile) if name in ("COPY", "ADD")]
    return [source for words in copies if not words[0].startswith("--from") for source in words[:-1]]


def unit() -> dict[str, list[str]]:
    """The keys of the systemd unit, each with its values in their order."""
    keys: dict[str, list[str]] = {}
    for line in UNIT.read_text().splitlines():
        if line and line[0] not in "#[":
            key, value = line.split("=", 1)
            keys.setdefault(key, []).append(value)
    return keys
