"""A prompt file -> its Requests, one by one, in constant memory; and every line of it that is bad.

It owns bytes, line ends, UTF-8, the file's hash, its one model, and the one kind of its requests. It does not know JSON
or what the keys of a line mean (`producer.requests` does), nor what other kinds of files look like
(`jobs.runtime.files.formats`), nor what becomes of a Request: its caller may `report` more bad lines, such as a
custom_id that the store has seen before.

A file is opened once and read once. Lines end at a line feed alone; any other line end of Unicode is text.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
import sys
from collections.abc import Collection, Iterator
from itertools import islice
from pathlib import PurePath
from types import TracebackType
from typing import BinaryIO, NamedTuple, NoReturn

from batchmill.jobs.errors import PromptFileError
from batchmill.jobs.requests.request import DEFAULT_LINE_BYTES, MAX_LINE_BYTES, Request
from batchmill.jobs.runtime.counted import counted
from batchmill.jobs.runtime.files import formats
from batchmill.producer.files.problems import Problems
from batchmill.producer.requests.checks import BadLine, shown
from batchmill.producer.requests.generation import text_request
from batchmill.producer.requests.kinds import FORMS
from batchmill.producer.requests.lines import Lines
from batchmill.producer.requests.strict_json import json_value

#: A line that goes on for longer than this has no end, as that of /dev/zero, and the file is read no further.
ENDLESS_BYTES = MAX_LINE_BYTES
BUFFER_BYTES = 1 << 17
#: The bytes that may stand around a line: a byte order mark before it and CRLF behind, and one byte more.
_AROUND_BYTES = 6
_BOM = b"\xef\xbb\xbf"


def _printable(path: str) -> str:
    """A file's name, which may be any bytes, as text that goes into one line and into every database."""
    text = os.fsencode(path).decode(errors="backslashreplace")
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


class PromptLine(NamedTuple):
    """A request, the line that it stands on (from 1), and that line's size."""

    number: int
    request: Request
    size_bytes: int


class PromptFile:
    """Iterated once, it yields a PromptLine for every good line of `path` (`-`: standard input).

    Bad lines are left out and do not stop the iteration; after it, `raise_if_bad` tells of them. A context manager,
    which closes the file.

    `form`: the form in which the file is read, one of `formats.PROMPTS`, instead of the one that its suffix says.
    `models`: the names that a line may have for the model; where there is none, the first one named is the file's.
    `adapters`: the adapters that a line may name, by the key `adapter` or in the model's place.

    Raises PromptFileError: here for what cannot be opened, and while iterating for what is no prompt file,
    changes meanwhile, or holds no prompts.
    """

    def __init__(
        self,
        path: str,
        *,
        form: str | None = None,
        models: Collection[str] = (),
        adapters: Collection[str] = (),
        ignore_line_model: bool = False,
        max_line_bytes: int = DEFAULT_LINE_BYTES,
    ) -> None:
        self._shown_path = "stdin" if path == "-" else _printable(path)
        self.name = PurePath(self._shown_path).name
        self.model: str | None = None
        #: The kind of all its requests, which is that of its first; None until that was read.
        self.kind: str | None = None
        self._lines = Lines(FORMS.values())
        self._models = frozenset(models)
        self._adapters = frozenset(adapters)
        self._named: set[str] = set()
        self._ignore_line_model = ignore_line_model
        self._max_line_bytes = max_line_bytes
        #: Any line may be one of text, so that nothing contradicts a user who says that the file is text.
        self._is_meant = form == "text"
        self._read_as = formats.read_as(path, form)
        self._hash = hashlib.sha256()
        self._problems = Problems()
        self._is_endless = False
        self._is_stdin = path == "-"
        self._stream = self._standard_input() if self._is_stdin else self._opened(path)

    def __enter__(self) -> PromptFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._is_stdin:
            self._stream.close()

    @property
    def sha256(self) -> str:
        """The hash of the bytes read so far, in hex: after the iteration, of the file."""
        return self._hash.hexdigest()

    @property
    def unnamed_adapters(self) -> list[str]:
        """The adapters that no line read so far names."""
        return sorted(self._adapters - self._named)

    def report(self, number: int, what: str, error: str | None = None) -> None:
        """Adds a problem of one line, counted from 1; `error`: what it is called on all lines that have it."""
        self._problems.add(number, what, error)

    @property
    def is_bad(self) -> bool:
        """True once one of its lines was bad."""
        return self._problems.count > 0

    def raise_if_bad(self) -> None:
        """Raises PromptFileError if any line was reported, in the order of the file."""
        count, unsaid = self._problems.count, self._problems.unsaid
        if count:
            summary = counted(count, "bad line")
            if unsaid:
                summary += f", of which {unsaid:,} with other errors are not listed"
            if self._is_endless:
                summary += f"; reading stopped {ENDLESS_BYTES >> 20} MiB into the last one"
            problems = self._problems.lines(self._shown_path)
            raise PromptFileError(f"{self._shown_path}: {summary}", problems=problems, count=count)

    def __iter__(self) -> Iterator[PromptLine]:
        index = 0
        before = self._fingerprint()
        lines = self._raw_lines()
        if not self._is_meant:
            lines = self._recognized(lines)
        for number, (offset, raw) in enumerate(lines, start=1):
            try:
                text = self._text(raw, offset)
                if not text or text.isspace():
                    continue
                request = self._request(text, index)
            except BadLine as exc:
                self.report(number, str(exc))
            else:
                yield PromptLine(number, request, len(raw))
            index += 1
        if self._fingerprint() != before:
            self._refuse("changed while it was being read; submit it again when nothing writes to it")
        if index == 0:
            self._refuse("holds no prompts")

    def _text(self, raw: bytes, offset: int) -> str:
        line = raw.removesuffix(b"\n").removesuffix(b"\r")
        if len(line) > self._max_line_bytes:
            raise BadLine(f"longer than {self._max_line_bytes} bytes; raise the setting max_line_bytes to allow it")
        try:
            return line.decode()
        except UnicodeDecodeError as exc:
            raise BadLine(f"not UTF-8: byte {offset + exc.start} is 0x{line[exc.start]:02x}") from None

    def _request(self, text: str, index: int) -> Request:
        request: Request
        if self._read_as == "text":
            request = text_request(text, index)
        else:
            request = self._lines.request(json_value(text), index, adapter_of=self._adapter_of)
        if self.kind is None:
            self.kind = request.kind
        elif request.kind != self.kind:
            raise BadLine(
                f"is a request of kind {request.kind}, and the file's first is one of kind {self.kind}; "
                "put each kind into a file of its own"
            )
        return request

    def _adapter_of(self, model: str | None, adapter: str | None) -> str | None:
        """The adapter that a line names, by its key or by its model's."""
        if adapter is not None and adapter not in self._adapters:
            declared = ", ".join(sorted(map(repr, self._adapters)))
            known = f"none of the adapters {declared}" if declared else "an adapter that was not declared"
            raise BadLine(f"is {shown(adapter)}, {known}; --adapter NAME declares one", "adapter")
        if model in self._adapters:
            if adapter not in (None, model):
                raise BadLine(f"is {shown(model)}, and adapter is {shown(adapter)}; name one of them", "model")
            adapter = model
        elif model is not None:
            self._check_model(model)
        if adapter is not None:
            self._named.add(adapter)
        return adapter

    def _check_model(self, name: str) -> None:
        if self._ignore_line_model or name in self._models:
            return
        if self._models:
            wanted = " or ".join([*sorted(map(repr, self._models)), *sorted(map(repr, self._adapters))])
            run_anyway = "-m MODEL --ignore-line-model runs every line on one model"
            raise BadLine(f"is {shown(name)} and not {wanted}; {run_anyway}", "model")
        self.model = name
        self._models = frozenset({name})

    def _recognized(self, lines: Iterator[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
        """The same lines, unless the first that is not blank shows that the file is of another kind.

        The next line is waited for only where the first may name columns.
        """
        path = "-" if self._is_stdin else self._shown_path
        for first in lines:
            if first[1].isspace():
                yield first
                continue
            begin = [first, *islice(lines, 1 if formats.needs_second(first[1]) else 0)]
            second = begin[1][1] if len(begin) > 1 else b""
            if what := formats.mistaken(first[1], second, read_as=self._read_as, path=path):
                self._refuse(what)
            yield from begin
            del first, begin, second  # long ones are not held any longer
            break
        yield from lines

    def _raw_lines(self) -> Iterator[tuple[int, bytes]]:
        """Each line's bytes and the offset of the first; of a line that is too long only the beginning."""
        offset = 0
        limit = self._max_line_bytes + _AROUND_BYTES
        while raw := self._read(limit):
            skipped = 0
            if offset == 0:
                self._refuse_foreign(raw)
                skipped = len(_BOM) if raw.startswith(_BOM) else 0
            yield offset + skipped, raw[skipped:]
            begin = offset
            offset += len(raw)
            is_cut = len(raw) == limit and not raw.endswith(b"\n")
            while is_cut and (rest := self._read(BUFFER_BYTES)):
                offset += len(rest)
                is_cut = not rest.endswith(b"\n")
                if is_cut and offset - begin > ENDLESS_BYTES:
                    self._is_endless = True
                    return

    def _read(self, limit: int) -> bytes:
        try:
            raw = self._stream.readline(limit)
        except OSError as exc:
            raise self._unreadable(exc) from exc
        self._hash.update(raw)
        return raw

    def _refuse_foreign(self, first: bytes) -> None:
        if what := formats.foreign(first):
            # The kind of an archive may stand behind the end of its first line.
            self._refuse(formats.foreign(first + self._stream.read(formats.HEAD_BYTES)) or what)

    def _opened(self, path: str) -> BinaryIO:
        try:
            mode = os.stat(path).st_mode
            if stat.S_ISDIR(mode):
                self._refuse("is a folder; name the prompt file in it")
            if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)):
                self._refuse("is neither a file nor a pipe, but a device or a socket")
            return open(path, "rb", buffering=BUFFER_BYTES)
        except OSError as exc:
            raise self._unreadable(exc) from exc

    def _standard_input(self) -> BinaryIO:
        if sys.stdin is None or sys.stdin.closed:
            self._refuse("is closed")
        return sys.stdin.buffer

    def _fingerprint(self) -> tuple[int, int] | None:
        """The size and time of a regular file, which change when somebody writes to it; None for a stream."""
        try:
            status = os.fstat(self._stream.fileno())
        except io.UnsupportedOperation:
            return None
        return (status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else None

    def _unreadable(self, error: OSError) -> PromptFileError:
        return PromptFileError(f"{self._shown_path}: cannot be read: {error.strerror or error}")

    def _refuse(self, what: str) -> NoReturn:
        raise PromptFileError(f"{self._shown_path}: {what}")
