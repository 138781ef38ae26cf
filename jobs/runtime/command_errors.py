"""The end of a command that cannot go on: one line on stderr and an exit code, never a traceback."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from batchmill.jobs.errors import BatchmillError, Interrupted, PromptFileError

#: The remedies for errors of the operating system, by errno.
_ADVICE = {
    errno.ENOSPC: "free some space and try again",
    errno.EDQUOT: "free some of your quota and try again",
    errno.EFBIG: "allow larger files, by `ulimit -f unlimited`",
    errno.EMFILE: "allow more open files, by `ulimit -n`",
    errno.ENAMETOOLONG: "use a shorter name",
    errno.EROFS: "name a place that can be written, by -o or BATCHMILL_HOME",
    errno.EACCES: "allow it to your user, or name another place, by -o or BATCHMILL_HOME",
    errno.EPERM: "allow it to your user, or name another place, by -o or BATCHMILL_HOME",
}
#: A longer word of a line is shown by its two ends.
_LONGEST_WORD = 300
_SHOWN_OF_WORD = 100


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns our errors, those of the operating system and Ctrl-C into a line on stderr and SystemExit.

    BrokenPipeError passes through: the reader of the pipe has seen enough.
    """
    try:
        yield
    except KeyboardInterrupt:
        say("interrupted")
        sys.exit(Interrupted.exit_code)
    except BatchmillError as error:
        if isinstance(error, PromptFileError):
            for problem in error.problems:
                print(_shortened(problem), file=sys.stderr)  # noqa: T201
        say(str(error))
        sys.exit(error.exit_code)
    except BrokenPipeError:
        raise
    except OSError as error:
        say(refusal(error))
        sys.exit(BatchmillError.exit_code)


def say(line: str) -> None:
    """Says something to the user who started the command."""
    print(f"batchmill: {_shortened(line)}", file=sys.stderr)  # noqa: T201


def refusal(error: OSError) -> str:
    """One line about an error of the operating system: the file, the error and its remedy."""
    where = error.filename if error.filename is not None else _unwritten_stdout()
    advice = _ADVICE.get(error.errno or 0)
    what = error.strerror or str(error) or type(error).__name__
    return _shortened(f"{f'{where}: ' if where else ''}{what}{f'; {advice}' if advice else ''}")


def _unwritten_stdout() -> str:
    """`stdout`, if it is what takes no more; the rest of it is given up, or it would fail once more at the end."""
    if sys.stdout is None:
        return ""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return "stdout"
    return ""


def _shortened(line: str) -> str:
    def ends(match: re.Match[str]) -> str:
        word = match[0]
        return f"{word[:_SHOWN_OF_WORD]}...{word[-_SHOWN_OF_WORD:]}"

    return re.sub(rf"\S{{{_LONGEST_WORD + 1},}}", ends, line)
