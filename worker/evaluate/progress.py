"""The progress of an evaluation, on stderr: a live bar where that is a terminal, else a line a phase."""

from __future__ import annotations

from types import TracebackType

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class ProgressBar:
    """Shows the progress while its context is open. `specs`: the number of specs to come."""

    def __init__(self, specs: int) -> None:
        self._specs = specs
        self._spec = 0
        self._name = ""
        console = Console(stderr=True)
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=console, transient=True)
            self._task = self._bar.add_task("", total=None)

    def __enter__(self) -> ProgressBar:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def spec(self, name: str) -> None:
        """Begins the next spec."""
        self._spec += 1
        self._name = name
        self.phase("loading")

    def phase(self, what: str, total: int | None = None) -> None:
        """Begins a phase of the spec; `total`: the number of its steps, if it is known."""
        line = f"{self._name} ({self._spec} of {self._specs}): {what}"
        if self._bar is None:
            click.echo(line, err=True)
        else:
            self._bar.reset(self._task, description=line, total=total)

    def reached(self, count: int) -> None:
        """Shows the number of steps of the phase that are done."""
        if self._bar is not None:
            self._bar.update(self._task, completed=count)

    def say(self, line: str) -> None:
        """Prints a line that stays."""
        if self._bar is None:
            click.echo(line, err=True)
        else:
            self._bar.console.print(line, markup=False, highlight=False)
