"""How a command ends when it cannot go on: one line on stderr and an exit code, never a traceback."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from jobs.errors import BatchmillError, Interrupted, PromptFileError


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns our errors and Ctrl-C into a line on stderr and SystemExit."""
    try:
        yield
    except KeyboardInterrupt:
        _say("interrupted")
        sys.exit(Interrupted.exit_code)
    except BatchmillError as error:
        if isinstance(error, PromptFileError):
            for problem in error.problems:
                print(problem, file=sys.stderr)  # noqa: T201
        _say(str(error))
        sys.exit(error.exit_code)


def _say(line: str) -> None:
    print(f"batchmill: {line}", file=sys.stderr)  # noqa: T201
