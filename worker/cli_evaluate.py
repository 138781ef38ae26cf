"""The `evaluate` command."""

from __future__ import annotations

import click


@click.command(name="evaluate", epilog="Example: batchmill evaluate demo")
def main() -> None:
    """Not built yet."""
