"""The `plan` command."""

from __future__ import annotations

import click


@click.command(name="plan", epilog="Example: batchmill plan demo")
def main() -> None:
    """Not built yet."""
