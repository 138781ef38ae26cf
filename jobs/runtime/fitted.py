"""Lines for a narrow terminal: wrapped between words, with a hanging indent; a pipe gets them as they are."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Iterator
from textwrap import wrap

#: Begins the command at the end of a line, which is never wrapped, so that it can be copied.
_COMMAND = " batchmill "


def terminal_width() -> int | None:
    """The columns of the terminal that stdout is; None where it is none."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def fitted(lines: Iterable[str], *, indent: int, width: int | None) -> Iterator[str]:
    """These lines in at most `width` columns, where there is a width and a word has room in it."""
    for line in lines:
        if width is None or len(line) <= width:
            yield line
            continue
        text, separator, command = line.partition(_COMMAND if "`" not in line else "\n")
        margin = " " * min(indent, width // 2)
        yield from wrap(text, width, subsequent_indent=margin, break_long_words=False, break_on_hyphens=False)
        if separator:
            yield f"{margin}{_COMMAND.lstrip()}{command}"
