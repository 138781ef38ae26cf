"""The commands of the worker's room as parts of `batchmill`, by whose name their help calls them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from importlib import import_module
from typing import Any

import click
from click.shell_completion import CompletionItem

from batchmill.jobs.configuration.option_groups import Groups, write_example, write_options
from batchmill.jobs.models.hub_cache import known_names


class WorkerCommand(click.Command):
    """A command whose help has its options in groups."""

    def __init__(self, *args: Any, groups: Groups | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.groups = groups or {}

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        write_options(self.get_params(ctx), self.groups, ctx, formatter)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        write_example(self.epilog, formatter)


def takes_model(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command with the model as an argument, or as the option that other commands have for it."""

    @wraps(command)
    def run(model: str | None, named: str | None, **others: Any) -> Any:
        if (model is None) == (named is None):
            raise click.UsageError("name one model: as MODEL, or by -m")
        return command(model=model or named, **others)

    option = click.option("-m", "--model", "named", shell_complete=complete_model, help="Same as MODEL.")
    return click.argument("model", required=False, shell_complete=complete_model)(option(run))


class Room(click.Group):
    """The `main` of each module under its command's name, imported when it is called."""

    def __init__(self, modules: Mapping[str, str]) -> None:
        super().__init__(
            "batchmill", context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
        )
        self._modules = modules

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self._modules)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        command: click.Command | None = None
        if cmd_name in self._modules:
            command = import_module(self._modules[cmd_name]).main
        return command


def complete_model(_ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The models that are known here, else folders."""
    return [*map(CompletionItem, known_names(incomplete))] or [CompletionItem(incomplete, type="dir")]
