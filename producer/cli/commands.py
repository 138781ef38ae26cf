"""The commands of batchmill in the order of work: the module that has each, and what it is for.

A module is imported when one of its commands is called, so that `batchmill --help` answers in a moment.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import click

from batchmill.jobs.configuration.option_groups import Groups, write_example, write_options
from batchmill.jobs.runtime.command_errors import one_line_errors
from batchmill.jobs.runtime.process.signals import block_sigterm

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

#: The commands that are processes of their own: this one never imports torch, nor the worker's room.
_WORKERS_ROOM = "worker"


class Entry(NamedTuple):
    """One command: the module that has it, and its line in the help of all."""

    module: str
    summary: str


SECTIONS: dict[str, dict[str, Entry]] = {
    "Answer a file on this machine": {
        "run": Entry("batchmill.producer.cli.submit", "Answer a file of prompts in one command, without any setup."),
        "up": Entry("batchmill.producer.cli.submit", "Run Redis, the store and workers for other terminals."),
    },
    "Jobs": {
        "submit": Entry("batchmill.producer.cli.submit", "Store a file as a job and notify its workers."),
        "status": Entry("batchmill.producer.cli.jobs", "Show a job's progress, its workers, and when it ends."),
        "wait": Entry("batchmill.producer.cli.jobs", "Wait until a job ends."),
        "results": Entry("batchmill.producer.cli.jobs", "Write the outputs of a job in file order."),
        "jobs": Entry("batchmill.producer.cli.jobs", "List the newest jobs."),
        "cancel": Entry("batchmill.producer.cli.jobs", "Cancel a job; finished outputs are kept."),
        "retry": Entry("batchmill.producer.cli.jobs", "Retry failed and cancelled requests."),
    },
    "Models": {
        "plan": Entry(_WORKERS_ROOM, "Show how much memory a model needs in each quantization, without loading it."),
        "models": Entry(_WORKERS_ROOM, "Download a model, or save a quantized copy of one."),
        "evaluate": Entry(_WORKERS_ROOM, "Measure the cost of quantization on your own text."),
    },
    "Workers": {
        "worker": Entry(_WORKERS_ROOM, "Run a worker: one quantized model on one device."),
        "workers": Entry("batchmill.producer.cli.jobs", "List the live workers and their models."),
        "logs": Entry("batchmill.producer.cli.jobs", "Show the logs of this machine's workers."),
    },
    "This installation": {
        "doctor": Entry(
            "batchmill.producer.cli.installation", "Check this installation, or explain why a job makes no progress."
        ),
        "db": Entry("batchmill.producer.cli.installation", "Manage the tables of the store: upgrade, check."),
    },
}
ENTRIES = {name: entry for section in SECTIONS.values() for name, entry in section.items()}


class Command(click.Command):
    """A command whose help has its options in groups."""

    def __init__(self, *args: Any, groups: Groups | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.groups = groups or {}

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        write_options(self.get_params(ctx), self.groups, ctx, formatter)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        write_example(self.epilog, formatter)


class Commands(click.Group):
    """A group of the commands above, whose errors are one line each."""

    def invoke(self, ctx: click.Context) -> Any:
        with one_line_errors():
            return super().invoke(ctx)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(ENTRIES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in ENTRIES:
            return None
        module = ENTRIES[cmd_name].module
        if module == _WORKERS_ROOM:
            return _OfTheWorkersRoom(cmd_name)
        command: click.Command = next(each for each in import_module(module).COMMANDS if each.name == cmd_name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        written = args[0]
        if written in ENTRIES or written.startswith("-") or ctx.resilient_parsing:
            return super().resolve_command(ctx, args)
        from difflib import get_close_matches

        near = get_close_matches(written, ENTRIES, n=1)
        raise click.UsageError(f"No such command {written!r}." + (f" Did you mean {near[0]!r}?" if near else ""), ctx)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, section in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(name, entry.summary) for name, entry in section.items()])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        write_example(self.epilog, formatter)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        named = [CompletionItem(name, help=entry.summary) for name, entry in ENTRIES.items()]
        options = click.Command.shell_complete(self, ctx, incomplete)
        return [each for each in named if each.value.startswith(incomplete)] + options


class _OfTheWorkersRoom(click.Command):
    """A command that becomes a process of its own, also to say how its words can be completed."""

    def __init__(self, name: str) -> None:
        super().__init__(
            name,
            callback=lambda arguments: become_worker([name, *arguments]),
            params=[click.Argument(["arguments"], nargs=-1, type=click.UNPROCESSED, shell_complete=_completed)],
            context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
            add_help_option=False,
        )

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        return _completed()


def _completed(*_: object) -> list[CompletionItem]:
    become_worker([])  # which finds the words in the environment, as this process has


def become_worker(words: list[str]) -> NoReturn:
    """Replaces this process by one of the worker's room, to which these words are its command line."""
    sys.stdout.flush()
    block_sigterm()
    os.execv(sys.executable, [sys.executable, "-P", "-m", "batchmill.worker", *words])
