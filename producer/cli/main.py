"""The batchmill command. Data on stdout, prose on stderr."""

from __future__ import annotations

import click

from batchmill.jobs.runtime.command_errors import one_line_errors
from batchmill.producer.cli.commands import Commands


def _show_version(ctx: click.Context, _option: click.Parameter, is_given: bool) -> None:
    if is_given and not ctx.resilient_parsing:
        from batchmill.jobs import VERSION

        click.echo(f"batchmill, version {VERSION}")
        ctx.exit()


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Example: batchmill run prompts.jsonl -m demo -o answers.jsonl",
)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_show_version, help="Show the version."
)
def cli() -> None:
    """Turn files of prompts into files of answers, with quantized models on your own GPUs.

    On one machine: `batchmill run prompts.jsonl -m MODEL -o answers.jsonl`. On several: submit jobs to a shared
    store and start one worker per GPU.
    """


def main() -> None:
    """Runs one command, in a process that `producer.__main__` prepared."""
    with one_line_errors():  # those of --help and --version, which are no command
        cli(prog_name="batchmill")
