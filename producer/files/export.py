"""Export of a job's outputs to a file of answers: JSONL, the OpenAI Batch format, or CSV, in file order.

It reads the store alone, in short pages, and holds no transaction while it writes. It owns files and stdout, and does
not know what a line says (producer.requests.result_lines does).
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from batchmill.jobs.errors import BatchmillError, UsageError, WriteFailed
from batchmill.jobs.requests.states import RequestState
from batchmill.jobs.runtime.counted import counted
from batchmill.jobs.runtime.failpoints import failpoint
from batchmill.jobs.runtime.files.output_file import check_target, replaced, written
from batchmill.jobs.store.store import Store
from batchmill.jobs.store.views.jobs import Job, OutputRow
from batchmill.producer.requests.result_lines import csv_columns, csv_row, jsonl_line, openai_line, to_json

_PAGE = 2_000
#: The values of `--only`, and the states that each lets through.
ONLY = {
    "all": frozenset({RequestState.SUCCEEDED, RequestState.FAILED, RequestState.CANCELLED}),
    "succeeded": frozenset({RequestState.SUCCEEDED}),
    "failed": frozenset({RequestState.FAILED, RequestState.CANCELLED}),
}


@dataclass(frozen=True, slots=True)
class Exported:
    """Counts of the outputs written, and of those in a file of errors; None without such a file."""

    count: int
    errors: int | None = None

    def line(self, out: Path, *, total: int) -> str:
        """The line about the written files and their outputs, of `total` of the job; an empty file is named, too."""
        text = f"wrote {self.count - (self.errors or 0):,} of {counted(total, 'output')} to {out}"
        if self.errors is None:
            return text
        beside = errors_path(out)
        if self.errors == 0:
            return f"{text}; {beside} is empty: none of them failed"
        return f"{text}, {self.errors:,} to {beside}"


def check_out(out: Path | None, *, form: str, keep: Iterable[str | Path], prompts: str | None = None) -> None:
    """Raises UsageError, before any work is done, for an `out` that could not be written, or that is to be kept."""
    for each in _targets(out, form):
        check_target(each, keep=keep, prompts=prompts)


def export(store: Store, job: Job, *, out: Path | None, form: str, only: str) -> Exported:
    """Writes a job's outputs to `out`, or to stdout; returns their counts.

    With a file, the OpenAI form puts the successes there and the rest beside it, with `.errors` before the suffix.
    Files are replaced whole, at the end; a pipe or a device is written to. Raises BatchmillError, which says how to
    get what is kept.
    """
    try:
        for each in _targets(out, form):
            _refuse_prompts(each, job)
        return _export(store, job, out, form=form, only=only)
    except WriteFailed as error:
        again = f"the answers are kept in job {job.id}: `batchmill results {job.id} -o FILE` writes them"
        raise BatchmillError(f"{error}; {again}") from error


def _targets(out: Path | None, form: str) -> tuple[Path | None, ...]:
    return (out,) if out is None or form != "openai" else (out, errors_path(out))


def _refuse_prompts(target: Path | None, job: Job) -> None:
    """Raises UsageError for a file that holds the job's own prompts, whatever its name is by now."""
    file = target or Path("/dev/stdout")
    if not file.is_file():
        return
    with suppress(OSError), file.open("rb") as opened:
        if hashlib.file_digest(opened, "sha256").hexdigest() == job.file_sha256:
            shown = "stdout" if target is None else f"-o {target}"
            raise UsageError(
                f"{shown} holds the prompts of job {job.id}, whose answers are kept: "
                f"`batchmill results {job.id} -o FILE` writes them to another file"
            )


def _export(store: Store, job: Job, out: Path | None, *, form: str, only: str) -> Exported:
    pages = store.jobs.output_pages(job.id, states=ONLY[only], page=_PAGE)
    if out is None:
        with standard_output("the answers") as file:
            return Exported(_write(file, pages, form=form, job=job))
    if form == "openai":
        return _export_openai(pages, job, out)
    with replaced(out) as file:
        return Exported(_write(file, pages, form=form, job=job))


def errors_path(out: Path) -> Path:
    """The file of errors beside an OpenAI output file: `answers.jsonl` has `answers.errors.jsonl`."""
    return out.with_suffix(f".errors{out.suffix}")


@contextmanager
def standard_output(what: str) -> Iterator[IO[str]]:
    """stdout in UTF-8, whatever the locale: an export has the same bytes everywhere. Raises WriteFailed."""
    if sys.stdout is None:
        raise WriteFailed(f"cannot write {what} to stdout: it is closed")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="strict", newline="")
    with written(f"{what} to stdout"):
        try:
            yield sys.stdout
            sys.stdout.flush()
        except BrokenPipeError:
            raise  # whoever read it has seen enough; click ends the command without a word
        except OSError:
            # The rest of the buffer would be written once more at the end, and fail with a traceback.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise


def _export_openai(pages: Iterable[list[OutputRow]], job: Job, out: Path) -> Exported:
    count = errors = 0
    with ExitStack() as stack:
        good = stack.enter_context(replaced(out))
        bad = stack.enter_context(replaced(errors_path(out)))
        stack.enter_context(written(out))  # else the file that was opened last is named for either
        for page in pages:
            count += len(page)
            for row in page:
                is_good = row.state == RequestState.SUCCEEDED
                errors += not is_good
                file = good if is_good else bad
                file.write(to_json(openai_line(row, job)) + "\n")
            failpoint("export.written")
    return Exported(count, errors)


def _write(file: IO[str], pages: Iterable[list[OutputRow]], *, form: str, job: Job) -> int:
    line_of: dict[str, Callable[[OutputRow], str]] = {
        "jsonl": lambda row: to_json(jsonl_line(row, job)) + "\n",
        "openai": lambda row: to_json(openai_line(row, job)) + "\n",
        "csv": lambda row: _csv_text(csv_row(row, job)),
    }
    if form == "csv":
        file.write(_csv_text(csv_columns(job.kind)))
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
