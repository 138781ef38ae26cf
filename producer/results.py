"""From the store to a file of answers: JSONL, the OpenAI Batch format, or CSV, in file order.

It reads the store alone, in short pages, and holds no transaction while it writes.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from jobs.errors import BatchmillError
from jobs.failpoints import failpoint
from jobs.schema import ErrorCode
from jobs.states import RequestState
from jobs.store import Store
from jobs.store.reading import Job, OutputRow

_PAGE = 2_000
#: So much of a file's name, of at most 255 bytes, goes into that of the one that is written beside it.
_NAME_LENGTH = 40
PASSTHROUGH = ("user", "metadata", "store", "service_tier")
CSV_COLUMNS = (
    "index",
    "custom_id",
    "text",
    "finish_reason",
    "prompt_tokens",
    "completion_tokens",
    "error_code",
    "error_message",
    *PASSTHROUGH,
)
#: What `--only` takes, as the states that it lets through.
ONLY = {
    "all": frozenset({RequestState.SUCCEEDED, RequestState.FAILED, RequestState.CANCELLED}),
    "succeeded": frozenset({RequestState.SUCCEEDED}),
    "failed": frozenset({RequestState.FAILED, RequestState.CANCELLED}),
}
_to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


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
                file.write(_to_json(openai_line(row, job)) + "\n")
            failpoint("export.written")
    return count


def _write(file: IO[str], pages: Iterable[list[OutputRow]], *, form: str, job: Job) -> int:
    line_of: dict[str, Callable[[OutputRow], str]] = {
        "jsonl": lambda row: _to_json(jsonl_line(row)) + "\n",
        "openai": lambda row: _to_json(openai_line(row, job)) + "\n",
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


def jsonl_line(row: OutputRow) -> dict[str, Any]:
    """One output as batchmill writes it; what the request passed through follows under its own keys."""
    first = _first_choice(row)
    line: dict[str, Any] = {
        "index": row.index,
        "custom_id": row.custom_id,
        "text": first.get("text"),
        "finish_reason": first.get("finish_reason"),
        "prompt_tokens": row.prompt_tokens,
        "completion_tokens": row.completion_tokens,
        "error": None if row.error_code is None else {"code": row.error_code, "message": row.error_message},
    }
    return line | _passthrough(row)


def csv_row(row: OutputRow) -> tuple[Any, ...]:
    """The values of CSV_COLUMNS; passed through objects are JSON text."""
    first, passed = _first_choice(row), _passthrough(row)
    return (
        row.index,
        row.custom_id,
        first.get("text"),
        first.get("finish_reason"),
        row.prompt_tokens,
        row.completion_tokens,
        row.error_code,
        row.error_message,
        *(value if isinstance(value := passed.get(name), str | None) else _to_json(value) for name in PASSTHROUGH),
    )


def openai_line(row: OutputRow, job: Job) -> dict[str, Any]:
    """One line of the OpenAI Batch API; its ids follow from job and index, so that two exports are equal."""
    response = None
    error = None
    if row.error_code is None:
        response = {"status_code": 200, "request_id": _id("req_", job, row), "body": _completion(row, job)}
    elif row.error_code == ErrorCode.CANCELLED:
        error = {"code": "batch_cancelled", "message": row.error_message}
    else:
        status_code = 500 if row.error_code in _OUR_FAULT else 400
        response = {"status_code": status_code, "request_id": _id("req_", job, row), "body": {"error": _api_error(row)}}
    return {"id": _id("batch_req_", job, row), "custom_id": row.custom_id, "response": response, "error": error}


def _completion(row: OutputRow, job: Job) -> dict[str, Any]:
    chat = '"messages":' in row.body and "messages" in json.loads(row.body)
    body: dict[str, Any] = {
        "id": _id("chatcmpl-" if chat else "cmpl-", job, row),
        "object": "chat.completion" if chat else "text_completion",
        "created": int(row.finished_at),
        "model": job.spec.model,
        "choices": [_choice(place, each, chat) for place, each in enumerate(json.loads(row.choices))],
        "usage": {
            "prompt_tokens": row.prompt_tokens,
            "completion_tokens": row.completion_tokens,
            "total_tokens": row.prompt_tokens + row.completion_tokens,
        },
        "system_fingerprint": None,
    }
    return body | _passthrough(row)


def _choice(place: int, choice: Mapping[str, Any], chat: bool) -> dict[str, Any]:
    text = choice["text"]
    said = {"message": {"role": "assistant", "content": text, "refusal": None}} if chat else {"text": text}
    return {"index": place, **said, "logprobs": None, "finish_reason": choice["finish_reason"]}


def _api_error(row: OutputRow) -> dict[str, Any]:
    kind = "server_error" if row.error_code in _OUR_FAULT else "invalid_request_error"
    return {"message": row.error_message, "type": kind, "param": None, "code": row.error_code}


_OUR_FAULT = frozenset({ErrorCode.OUT_OF_MEMORY.value, ErrorCode.ENGINE_ERROR.value})


def _id(prefix: str, job: Job, row: OutputRow) -> str:
    return prefix + hashlib.sha256(f"{prefix}{job.id}/{row.index}".encode()).hexdigest()[:24]


def _first_choice(row: OutputRow) -> Mapping[str, Any]:
    choices = json.loads(row.choices)
    first: Mapping[str, Any] = choices[0] if choices else {}
    return first


def _passthrough(row: OutputRow) -> dict[str, Any]:
    if '"passthrough":' not in row.body:
        return {}
    passed: dict[str, Any] = json.loads(row.body).get("passthrough", {})
    return passed


def _csv_text(values: Iterable[Any]) -> str:
    """A line of CSV. Python quotes a lone CR, at which readers would break the line, only where lines end in one."""
    buffer = io.StringIO(newline="")
    csv.writer(buffer, lineterminator="\r\n").writerow(values)
    return buffer.getvalue().removesuffix("\r\n") + "\n"
