"""The `models` command."""

from __future__ import annotations

import click


@click.command(name="models", epilog="Example: batchmill models demo")
def main() -> None:
    """Not built yet."""
