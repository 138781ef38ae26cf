"""From the store to a file of answers: JSONL, the OpenAI Batch format, or CSV, in file order.

It reads the store alone, in short pages, and holds no transaction while it writes. It owns files and stdout, and does
not know what a line says (producer.answers does).
"""

from __future__ import annotations

import csv
import io
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from jobs.errors import BatchmillError
from jobs.failpoints import failpoint
from jobs.states import RequestState
from jobs.store import Store
from jobs.store.reading import Job, OutputRow
from producer.answers import CSV_COLUMNS, csv_row, jsonl_line, openai_line, to_json

_PAGE = 2_000
#: So much of a file's name, of at most 255 bytes, goes into that of the one that is written beside it.
_NAME_LENGTH = 40
#: What `--only` takes, as the states that it lets through.
ONLY = {
    "all": frozenset({RequestState.SUCCEEDED, RequestState.FAILED, RequestState.CANCELLED}),
    "succeeded": frozenset({RequestState.SUCCEEDED}),
    "failed": frozenset({RequestState.FAILED, RequestState.CANCELLED}),
}


def export(store: Store, job: Job, *, out: Path | None, form: str, only: str) -> int:
    """Writes a job's outputs to `out`, or to stdout: how many.

    With a file, the OpenAI form puts the successes there and the rest beside it, with `.errors` before the suffix.
    Files are replaced whole, at the end; a pipe or a device is written to. Raises BatchmillError.
    """
    pages = store.reading.output_pages(job.id, states=ONLY[only], page=_PAGE)
    if out is None:
        with standard_output("the answers") as file:
            return _write(file, pages, form=form, job=job)
    if form == "openai":
        return _export_openai(pages, job, out)
    with replaced(out) as file:
        return _write(file, pages, form=form, job=job)


def errors_path(out: Path) -> Path:
    """Where the errors go beside an OpenAI output file: `answers.jsonl` has `answers.errors.jsonl`."""
    return out.with_suffix(f".errors{out.suffix}")


@contextmanager
def replaced(path: Path) -> Iterator[IO[str]]:
    """A text file that takes the place of `path` when the block ends well, and is gone otherwise.

    The file that a link leads to is replaced, and not the link. What is no file (/dev/null, a FIFO) is written to.
    """
    with _one_line(path):
        if path.exists() and not path.is_file():
            with path.open("w", encoding="utf-8", newline="") as file:
                yield file
        else:
            with _beside(Path(os.path.realpath(path))) as file:
                yield file


@contextmanager
def _beside(path: Path) -> Iterator[IO[str]]:
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:_NAME_LENGTH]}.")
    try:
        with open(descriptor, "w", encoding="utf-8", newline="") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        _keep_mode(path, temporary)
        failpoint("export.replaced")
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


@contextmanager
def standard_output(what: str) -> Iterator[IO[str]]:
    """stdout in UTF-8, whatever the locale: an export has the same bytes everywhere. Raises BatchmillError."""
    if sys.stdout is None:
        raise BatchmillError(f"cannot write {what} to stdout: it is closed")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="strict", newline="")
    with _one_line(f"{what} to stdout"):
        try:
            yield sys.stdout
            sys.stdout.flush()
        except BrokenPipeError:
            raise  # whoever read it has seen enough; click ends the command without a word
        except OSError:
            # What is left in the buffer would be written once more at the end, and fail with a traceback.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise


@contextmanager
def _one_line(what: object) -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise BatchmillError(f"cannot write {what}: {error.strerror or error}") from error


def _keep_mode(path: Path, temporary: str) -> None:
    """A temporary file is private; its successor has the mode that the file had, or a new file would have."""
    if path.exists():
        mode = path.stat().st_mode & 0o777
    else:
        mask = os.umask(0)
        os.umask(mask)
        mode = 0o666 & ~mask
    os.chmod(temporary, mode)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _export_openai(pages: Iterable[list[OutputRow]], job: Job, out: Path) -> int:
    count = 0
    with ExitStack() as stack:
        good = stack.enter_context(replaced(out))
        bad = stack.enter_context(replaced(errors_path(out)))
        stack.enter_context(_one_line(out))  # else the file that was opened last is named for either
        for page in pages:
            count += len(page)
            for row in page:
                file = good if row.state == RequestState.SUCCEEDED else bad
                file.write(to_json(openai_line(row, job)) + "\n")
            failpoint("export.written")
    return count


def _write(file: IO[str], pages: Iterable[list[OutputRow]], *, form: str, job: Job) -> int:
    line_of: dict[str, Callable[[OutputRow], str]] = {
        "jsonl": lambda row: to_json(jsonl_line(row)) + "\n",
        "openai": lambda row: to_json(openai_line(row, job)) + "\n",
        "csv": lambda row: _csv_text(csv_row(row)),
    }
    if form == "csv":
        file.write(_csv_text(CSV_COLUMNS))
    count = 0
    for page in pages:
        file.write("".join(map(line_of[form], page)))
        count += len(page)
        failpoint("export.written")
    return count


def _csv_text(values: Iterable[Any]) -> str:
    """A line of CSV. Python quotes a lone CR, at which readers would break the line, only where lines end in one."""
    buffer = io.StringIO(newline="")
    csv.writer(buffer, lineterminator="\r\n").writerow(values)
    return buffer.getvalue().removesuffix("\r\n") + "\n"
