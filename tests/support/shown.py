"""Command lines that pages and files of deploy/ show, as batchmill takes them: parsed, and never run."""

from __future__ import annotations

from importlib import import_module

import click

from batchmill.producer.cli.main import cli
from batchmill.worker.__main__ import MODULES


def parsed(arguments: list[str]) -> click.Context:
    """The context that batchmill makes of these arguments. Raises click's UsageError; runs nothing."""
    command: click.Command | None = cli
    name, rest = "batchmill", arguments
    while isinstance(command, click.Group) and rest[:1] not in (["-h"], ["--help"], ["--version"]):
        first = command is cli
        name, *rest = rest or [""]
        if first and name in MODULES:
            command = import_module(MODULES[name]).main
        else:
            command = command.get_command(click.Context(command), name)
    if command is None:
        raise click.UsageError(f"no command {name}")
    return command.make_context(name, rest)
