"""A prompt file -> its Requests, one by one, in constant memory; and every line of it that is bad.

It owns bytes, line ends, UTF-8, the file's hash, its one model, and the list of problems. It does not know JSON
(producer.strict_json does), nor what the keys of a line mean (producer.lines), nor what becomes of a Request: its
caller may `report` more bad lines, such as a custom_id that the store has seen before.

A file is opened once and read once. Lines end at a line feed alone; any other line end of Unicode is text.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import stat
import sys
from collections.abc import Collection, Iterator
from pathlib import PurePath
from types import TracebackType
from typing import BinaryIO, NamedTuple, NoReturn

from jobs.errors import PromptFileError
from jobs.schema import DEFAULT_LINE_BYTES, MAX_LINE_BYTES, Request
from producer.checks import BadLine, shown
from producer.lines import json_request, text_request
from producer.strict_json import json_value

MAX_PROBLEMS = 100
#: A line that goes on for longer than this has no end, as that of /dev/zero, and the file is read no further.
ENDLESS_BYTES = MAX_LINE_BYTES
BUFFER_BYTES = 1 << 17
#: What may stand around a line: a byte order mark before it and CRLF behind, and one byte more.
_AROUND_BYTES = 6
_BOM = b"\xef\xbb\xbf"

_UTF8_ALONE = "prompt files are UTF-8, so convert it: iconv -f"
_PACKED = "which batchmill does not unpack; run"
#: What the first bytes of a file that is not plain UTF-8 look like, and what is said of it.
_FOREIGN = (
    (rb"\xff\xfe\0\0|\0\0\xfe\xff", f"is UTF-32; {_UTF8_ALONE} UTF-32"),
    (rb"\xff\xfe|\xfe\xff", f"is UTF-16; {_UTF8_ALONE} UTF-16"),
    (rb"[^\0]\0[^\0]\0", f"looks like UTF-16; {_UTF8_ALONE} UTF-16LE"),
    (rb"\0[^\0]\0[^\0]", f"looks like UTF-16; {_UTF8_ALONE} UTF-16BE"),
    (rb"\x1f\x8b", f"is compressed by gzip, {_PACKED} gunzip first"),
    (rb"\x28\xb5\x2f\xfd", f"is compressed by zstd, {_PACKED} zstd -d first"),
    (rb"PK[\x03\x05]", f"is a zip archive, {_PACKED} unzip first"),
    (rb"BZh[1-9]1AY&SY", f"is compressed by bzip2, {_PACKED} bunzip2 first"),
    (rb"\xfd7zXZ\0", f"is compressed by xz, {_PACKED} unxz first"),
)


def is_plain_text(path: str) -> bool:
    """Whether the file is one of plain lines; all else is JSONL."""
    return path.lower().endswith(".txt")


def _printable(path: str) -> str:
    """A file's name, which may be any bytes, as text that goes into one line and into every database."""
    text = os.fsencode(path).decode(errors="backslashreplace")
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


class Line(NamedTuple):
    """A request, the line that it stands on (from 1), and that line's size."""

    number: int
    request: Request
    size_bytes: int


class PromptFile:
    """Iterated once, it yields a Line for every good line of `path` (`-`: standard input).

    Bad lines are left out and do not stop the iteration; after it, `raise_if_bad` tells of them. `.txt` files
    hold one prompt per line, all else JSONL. A line may name a model of `models`; where that is empty, the
    first one named is the file's `model`. An adapter of `adapters` is named by `adapter` or in the model's place.
    A context manager, which closes the file.

    Raises PromptFileError: here for what cannot be opened, and while iterating for what is no prompt file,
    changes meanwhile, or holds no prompts.
    """

    def __init__(
        self,
        path: str,
        *,
        models: Collection[str] = (),
        adapters: Collection[str] = (),
        ignore_line_model: bool = False,
        max_line_bytes: int = DEFAULT_LINE_BYTES,
    ) -> None:
        self._shown_path = "stdin" if path == "-" else _printable(path)
        self.name = PurePath(self._shown_path).name
        self.model: str | None = None
        self._models = frozenset(models)
        self._adapters = frozenset(adapters)
        self._named: set[str] = set()
        self._ignore_line_model = ignore_line_model
        self._max_line_bytes = max_line_bytes
        self._plain_text = is_plain_text(path)
        self._hash = hashlib.sha256()
        self._problems: list[tuple[int, str]] = []
        self._bad_lines = 0
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
        """Of the bytes read so far, in hex: after the iteration, of the file."""
        return self._hash.hexdigest()

    @property
    def unnamed_adapters(self) -> list[str]:
        """The adapters that no line read so far names."""
        return sorted(self._adapters - self._named)

    def report(self, number: int, what: str) -> None:
        """Adds a problem of one line, counted from 1."""
        self._bad_lines += 1
        if len(self._problems) < MAX_PROBLEMS:
            self._problems.append((number, what))

    @property
    def is_bad(self) -> bool:
        """True once one of its lines was bad."""
        return self._bad_lines > 0

    def raise_if_bad(self) -> None:
        """Raises PromptFileError if any line was reported, in the order of the file."""
        if self._bad_lines:
            problems = [f"{self._shown_path}:{number}: {what}" for number, what in sorted(self._problems)]
            lines = "1 bad line" if self._bad_lines == 1 else f"{self._bad_lines} bad lines"
            unread = (
                f"; it was read no further than {ENDLESS_BYTES >> 20} MiB into the last" if self._is_endless else ""
            )
            raise PromptFileError(f"{self._shown_path}: {lines}{unread}", problems=problems, count=self._bad_lines)

    def __iter__(self) -> Iterator[Line]:
        index = 0
        before = self._fingerprint()
        for number, (offset, raw) in enumerate(self._raw_lines(), start=1):
            try:
                text = self._text(raw, offset)
                if not text or text.isspace():
                    continue
                request = self._request(text, index)
            except BadLine as exc:
                self.report(number, str(exc))
            else:
                yield Line(number, request, len(raw))
            index += 1
        if self._fingerprint() != before:
            self._refuse("changed while it was read; submit it again once nobody writes to it")
        if index == 0:
            self._refuse("holds no prompts")

    def _text(self, raw: bytes, offset: int) -> str:
        line = raw.removesuffix(b"\n").removesuffix(b"\r")
        if len(line) > self._max_line_bytes:
            raise BadLine(f"longer than {self._max_line_bytes} bytes; the setting max_line_bytes takes longer ones")
        try:
            return line.decode()
        except UnicodeDecodeError as exc:
            raise BadLine(f"not UTF-8: byte {offset + exc.start} is 0x{line[exc.start]:02x}") from None

    def _request(self, text: str, index: int) -> Request:
        if self._plain_text:
            return text_request(text, index)
        return json_request(json_value(text), index, adapter_of=self._adapter_of)

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

    def _raw_lines(self) -> Iterator[tuple[int, bytes]]:
        """Each line's bytes and the offset of the first; of a line that is too long only the beginning."""
        offset = 0
        most = self._max_line_bytes + _AROUND_BYTES
        while raw := self._read(most):
            skipped = 0
            if offset == 0:
                self._refuse_foreign(raw)
                skipped = len(_BOM) if raw.startswith(_BOM) else 0
            yield offset + skipped, raw[skipped:]
            begin = offset
            offset += len(raw)
            is_cut = len(raw) == most and not raw.endswith(b"\n")
            while is_cut and (rest := self._read(BUFFER_BYTES)):
                offset += len(rest)
                is_cut = not rest.endswith(b"\n")
                if is_cut and offset - begin > ENDLESS_BYTES:
                    self._is_endless = True
                    return

    def _read(self, most: int) -> bytes:
        try:
            raw = self._stream.readline(most)
        except OSError as exc:
            raise self._unreadable(exc) from exc
        self._hash.update(raw)
        return raw

    def _refuse_foreign(self, first: bytes) -> None:
        for pattern, what in _FOREIGN:
            if re.match(pattern, first):
                self._refuse(what)

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
        """What changes when somebody writes to a regular file; of a stream nothing."""
        try:
            status = os.fstat(self._stream.fileno())
        except io.UnsupportedOperation:
            return None
        return (status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else None

    def _unreadable(self, error: OSError) -> PromptFileError:
        return PromptFileError(f"{self._shown_path}: cannot be read: {error.strerror or error}")

    def _refuse(self, what: str) -> NoReturn:
        raise PromptFileError(f"{self._shown_path}: {what}")
