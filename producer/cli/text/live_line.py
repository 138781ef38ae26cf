"""The live line of a job that a terminal shows while a command waits, with advice on lines of its own."""

from __future__ import annotations

from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

_SHORTEST_BAR, _LONGEST_BAR = 10, 40


@dataclass(frozen=True, slots=True)
class LiveLine:
    """Count, bar and note in one line. In a narrow terminal the bar goes first, then the note to a line of its own."""

    title: str
    done: int
    total: int
    note: str = ""
    advice: tuple[str, ...] = ()  #: lines of their own; long ones are wrapped, and nothing of them is left out

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        count = f"{self.done:,}/{self.total:,} ended"
        figures = f"{count}, {self.note}" if self.note else count
        room = options.max_width - cell_len(f"{self.title} {figures}")
        if room > _SHORTEST_BAR:
            grid = Table.grid(padding=(0, 1), pad_edge=False)
            bar = ProgressBar(self.total, self.done, width=min(room - 1, _LONGEST_BAR))
            grid.add_row(Text(self.title), bar, Text(figures))
            yield grid
        elif room >= 0:
            yield Text(f"{self.title} {figures}")
        else:
            yield Text(f"{self.title} {count}")
            yield from map(Text, filter(None, [self.note]))
        yield from map(Text, self.advice)
