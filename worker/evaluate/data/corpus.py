"""A data file, read as the texts and questions that an evaluation is made on, and the file's hash.

Owns which lines a file may have, and how much of it is read: as many bytes as the wanted tokens can have, so that
the memory does not grow with the file. It knows no tokenizer.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from batchmill.jobs.errors import UsageError
from batchmill.jobs.runtime.files import formats

#: The bytes that are read for each wanted token: no tokenizer makes fewer tokens of common text.
BYTES_PER_TOKEN = 16
MAX_LINE_BYTES = 1 << 24
_BLOCK_BYTES = 1 << 20
_FORMS = '{"text"}, {"prompt", "answer"} or {"messages", "answer"}'


@dataclass(frozen=True, slots=True)
class DataEntry:
    """One text, or one question with its answer where the data has one.

    Exactly one of `text`, `prompt` and `messages` is set. Nothing of it is ever shown.
    """

    #: Counted from 1.
    line: int
    text: str | None = field(default=None, repr=False)
    prompt: str | None = field(default=None, repr=False)
    messages: tuple[Mapping[str, Any], ...] | None = field(default=None, repr=False)
    answer: str | None = field(default=None, repr=False)

    @property
    def asks(self) -> bool:
        return self.text is None


@dataclass(frozen=True, slots=True)
class Corpus:
    """The texts and questions that were read of one file."""

    name: str
    #: Of all bytes of the file.
    sha256: str
    examples: tuple[DataEntry, ...]

    @classmethod
    def read(cls, path: Path, *, tokens: int) -> Corpus:
        """Reads the beginning of a file: `.txt` is running text, all else JSON Lines; enough of it for so many tokens.

        Raises UsageError, which names file and line.
        """
        most_bytes = max(_BLOCK_BYTES, BYTES_PER_TOKEN * tokens)
        try:
            with path.open("rb") as stream:
                if what := formats.foreign(stream.peek(formats.HEAD_BYTES)):
                    raise UsageError(f"{path}: {what}")
                reading = _HashedStream(stream, path)
                running = formats.read_as(str(path)) == "text"
                examples = tuple(reading.running(most_bytes) if running else reading.lines(most_bytes))
                if not examples:
                    raise UsageError(f"{path}: holds no text")
                return cls(path.name, reading.sha256_of_all(), examples)
        except OSError as error:
            raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from error


class _HashedStream:
    """One pass over a file; every byte of it goes into its hash."""

    def __init__(self, stream: BinaryIO, path: Path) -> None:
        self._stream = stream
        self._path = path
        self._hash = hashlib.sha256()

    def sha256_of_all(self) -> str:
        """Reads the rest of the file, and returns the hash in hex."""
        while self._read(self._stream.read(_BLOCK_BYTES)):
            pass
        return self._hash.hexdigest()

    def running(self, most_bytes: int) -> Iterator[DataEntry]:
        raw = self._read(self._stream.read(most_bytes))
        decoder = codecs.getincrementaldecoder("utf-8-sig")()
        try:
            text = decoder.decode(raw, final=len(raw) < most_bytes)
        except UnicodeDecodeError as error:
            line = raw.count(b"\n", 0, error.start) + 1
            raise UsageError(f"{self._path}:{line}: is not UTF-8; convert it with iconv") from None
        if text.strip():
            yield DataEntry(1, text=text)

    def lines(self, most_bytes: int) -> Iterator[DataEntry]:
        number = taken = 0
        while taken < most_bytes and (raw := self._read(self._stream.readline(MAX_LINE_BYTES + 1))):
            number, taken = number + 1, taken + len(raw)
            if raw.strip():
                try:
                    yield _example(number, raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw)
                except ValueError as error:
                    raise UsageError(f"{self._path}:{number}: {error}") from None

    def _read(self, raw: bytes) -> bytes:
        self._hash.update(raw)
        return raw


def _example(number: int, raw: bytes) -> DataEntry:
    """The example of one line. Raises ValueError, which says what is wrong and quotes nothing."""
    if len(raw) > MAX_LINE_BYTES:
        raise ValueError(f"is longer than {MAX_LINE_BYTES >> 20} MiB")
    line = _object(raw)
    given = [key for key in ("text", "prompt", "messages") if line.get(key) is not None]
    if len(given) != 1:
        raise ValueError(f"holds {' and '.join(given) or 'no text'}; a line is {_FORMS}")
    messages = None if line.get("messages") is None else _messages(line["messages"])
    answer = line.get("answer")
    if answer is not None and given == ["text"]:
        raise ValueError(f"holds text and answer; a line is {_FORMS}")
    for key in ("text", "prompt", "answer"):
        if not isinstance(line.get(key), str | None):
            raise ValueError(f"{key} must be a string")
    return DataEntry(number, line.get("text"), line.get("prompt"), messages, answer)


def _object(raw: bytes) -> dict[str, Any]:
    try:
        value = json.loads(raw.decode())
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8; convert it with iconv") from None
    except json.JSONDecodeError as error:
        what = error.msg.removesuffix(" at").rstrip(": ")
        raise ValueError(f"is not JSON: {what} at column {error.colno}") from None
    except (RecursionError, ValueError):
        raise ValueError("is not JSON that can be read: it is nested too deep, or has a number too long") from None
    if not isinstance(value, dict):
        raise ValueError(f"is no JSON object; a line is {_FORMS}")
    return value


def _messages(value: Any) -> tuple[Mapping[str, Any], ...]:
    named = isinstance(value, list) and all(
        isinstance(each, dict) and isinstance(each.get("role"), str) for each in value
    )
    if not named or not value or not all(isinstance(each.get("content"), str) for each in value):
        raise ValueError("messages must be a list of at least one object with a role and a content that is a string")
    if any(each.get("tool_calls") for each in value):
        raise ValueError("messages with tool_calls are not taken")
    return tuple(value)
