"""The formats of prompt files and of answers: told by a suffix, or by the first bytes.

Owns both tables, and the messages about a file of another format than it is read as. It opens no file.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
import shlex
from dataclasses import dataclass
from pathlib import PurePath

from batchmill.jobs.errors import UsageError
from batchmill.jobs.runtime.counted import counted

#: The formats of prompt files, and those of answers.
PROMPTS = ("jsonl", "text")
ANSWERS = ("jsonl", "openai", "csv")

#: By suffix: the format of prompts, and those of answers, of which the first holds unless another is asked for.
READ_AS = {".txt": "text"}
WRITTEN_AS = {
    ".jsonl": ("jsonl", "openai"), ".ndjson": ("jsonl", "openai"), ".json": ("jsonl", "openai"), ".csv": ("csv",),
}  # fmt: skip
#: Suffixes of formats that answers are not written in.
NOT_WRITTEN = {
    ".tsv": "tab-separated values", ".xlsx": "an Excel workbook", ".xls": "an Excel workbook",
    ".parquet": "Parquet", ".gz": "gzip", ".zst": "zstd", ".bz2": "bzip2", ".xz": "xz", ".zip": "a zip archive",
}  # fmt: skip


def _with(form: str) -> str:
    return ", ".join(suffix for suffix, forms in WRITTEN_AS.items() if form in forms)


#: The tables in words, for the help of the options.
FILE_HELP = f"Format of FILE: text has one prompt per line (default for {', '.join(READ_AS)}), jsonl is JSON Lines."
OUT_HELP = f"File for the answers (default: stdout): {_with('csv')} is a table, anything else JSON Lines."
FORMAT_HELP = f"batchmill's JSON Lines, OpenAI Batch API output ({_with('openai')}), or a table ({_with('csv')})."

_UTF8_ALONE = "text is read as UTF-8, so convert it: iconv -f"
_PACKED = "which batchmill does not unpack; run"
_NOT_READ = "which batchmill does not read; write a .jsonl file of it, with a line for each prompt"
_SHEET = "which batchmill does not read; save its sheet as CSV UTF-8, and make each row of that a line of JSON"
_WORKBOOK = "an Excel workbook (.xlsx) or another file of Office"
_OLD_WORKBOOK = "an old Excel workbook (.xls) or another old file of Office"
#: The first bytes of files that are not plain UTF-8, each with the message about it.
_FOREIGN = (
    (rb"\xff\xfe\0\0|\0\0\xfe\xff", f"is UTF-32; {_UTF8_ALONE} UTF-32"),
    (rb"\xff\xfe|\xfe\xff", f"is UTF-16; {_UTF8_ALONE} UTF-16"),
    (rb"[^\0]\0[^\0]\0", f"looks like UTF-16; {_UTF8_ALONE} UTF-16LE"),
    (rb"\0[^\0]\0[^\0]", f"looks like UTF-16; {_UTF8_ALONE} UTF-16BE"),
    (rb"\x1f\x8b", f"is compressed by gzip, {_PACKED} gunzip first"),
    (rb"\x28\xb5\x2f\xfd", f"is compressed by zstd, {_PACKED} zstd -d first"),
    (rb"PK\x03\x04.{26}(\[Content_Types\]\.xml|_rels/|docProps/|xl/)", f"is {_WORKBOOK}, {_SHEET}"),
    (rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", f"is {_OLD_WORKBOOK}, {_SHEET}"),
    (rb"PK[\x03\x05]", f"is a zip archive, {_PACKED} unzip first"),
    (rb"BZh[1-9]1AY&SY", f"is compressed by bzip2, {_PACKED} bunzip2 first"),
    (rb"\xfd7zXZ\0", f"is compressed by xz, {_PACKED} unxz first"),
    (rb"PAR1[\0-\x1f]", f"is a Parquet file, {_NOT_READ}"),
    (rb"SQLite format 3\0", f"is a SQLite database, {_NOT_READ}"),
    (rb"%PDF-\d", f"is a PDF, {_NOT_READ}"),
    (rb"\x89PNG\r", f"is a picture, {_NOT_READ}"),
)
_NO_TEXT = f"is no text file; {_NOT_READ.removeprefix('which batchmill does not read; ')}"
#: Characters that no text has beside its white space and the escapes of a terminal.
_CONTROLS = frozenset({*range(32), 127} - {*b"\t\n\v\f\r\x1b"})
#: So many first bytes of a file are enough to tell all of these.
HEAD_BYTES = 64

_PRETTY = re.compile(rb"\s*\{\s*")
_ARRAY = re.compile(rb"\s*\[\s*(?:\Z|(?P<string>\")|[{\]])")
_HTML = re.compile(rb"\s*<(!doctype|html|\?xml)\b", re.IGNORECASE)
#: The name of a column; in text, of which nearly any line is a prompt, a single word alone.
_COLUMN, _WORD = re.compile(r"[^\W\d][\w .:/()#-]{0,63}"), re.compile(r"[^\W\d]\w{0,63}")
#: Likely names of a column of prompts.
_PROMPT_COLUMNS = ("prompt", "text", "question", "instruction", "input")
_REQUEST_KEYS = frozenset({"prompt", "messages", "body"})
#: A CSV as Python opens it.
_OPENED = 'open(sys.argv[1], encoding="utf-8-sig", newline="")'
#: So much of a line is looked at for columns.
_LOOKED_AT_BYTES = 1 << 16


def read_as(path: str, asked: str | None = None) -> str:
    """The format in which a file of prompts is read: `asked`, or else that of its suffix."""
    return asked or READ_AS.get(_suffix(path), PROMPTS[0])


def written_as(out: str | PurePath | None, asked: str | None = None) -> str:
    """The format in which answers are written to `out`, or to stdout; `asked`: the value of `--format`.

    Raises UsageError where that and the suffix of `out` exclude each other, or the suffix is of no format of answers.
    """
    suffix = "" if out is None else _suffix(out)
    if suffix in NOT_WRITTEN:
        raise UsageError(f"-o {out}: answers are not written as {NOT_WRITTEN[suffix]}; name a .jsonl or .csv file")
    forms = WRITTEN_AS.get(suffix, ANSWERS)
    if asked is not None and asked not in forms:
        fitting = next(suffix for suffix, forms in WRITTEN_AS.items() if asked in forms)
        raise UsageError(
            f"-o {out} means {forms[0]}, and --format says {asked}; leave --format out, or name a {fitting} file"
        )
    return asked or forms[0]


def foreign(begin: bytes) -> str | None:
    """A message about a file that begins so and is not plain UTF-8: what it is, and what to do; None if it may be."""
    known = next((message for pattern, message in _FOREIGN if re.match(pattern, begin, re.DOTALL)), None)
    return known or (_NO_TEXT if _is_binary(begin[:HEAD_BYTES]) else None)


def _is_binary(head: bytes) -> bool:
    """True for several NULs, and for other control characters where it is no UTF-8 either: a line may have one odd."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return not _CONTROLS.isdisjoint(head)
    return head.count(0) > 1


def needs_second(first: bytes) -> bool:
    """True where `mistaken` takes a second line beside this one: it may name the columns of a table, or be text."""
    return _table(first, _COLUMN) is not None or _is_text(first)


def mistaken(first: bytes, second: bytes, *, read_as: str, path: str) -> str | None:
    """A message about a file that holds no prompts in the format `read_as`, and what to do; None if it may hold some.

    `first`: its first line that is not blank, or the beginning of that. `second`: the next one, or empty.
    """
    return _no_text(first, second, path) if read_as == "text" else _no_lines(first, second, path)


def _no_text(first: bytes, second: bytes, path: str) -> str | None:
    """Refuses only lines that can hardly be prompts, since nearly anything is one."""
    as_it_is = "--format text takes each line as a prompt, as it is"
    if _is_request(first):
        return f"looks like JSON Lines and is named {PurePath(path).suffix}; --format jsonl reads it so, {as_it_is}"
    table = _table(first, _WORD)
    if table is not None and table.has_row(second):
        return f"looks like {table}; {as_it_is}, or make each row a line of JSON: {table.command(path)}"
    return None


def _no_lines(first: bytes, second: bytes, path: str) -> str | None:
    if array := _ARRAY.match(first):
        each = '{"prompt": each}' if array["string"] else "each"
        made = f"import json, sys; [print(json.dumps({each})) for each in json.load(open(sys.argv[1]))]"
        return f"looks like a JSON array, and not JSON Lines; make it some: {_python(made, path)}"
    if _PRETTY.fullmatch(first):
        return f"looks like JSON that is spread over lines, and not JSON Lines; make it some: jq -c . {_beside(path)}"
    if _HTML.match(first):
        return "looks like HTML or XML, which batchmill does not read; was a page fetched in the file's place?"
    table = _table(first, _COLUMN)
    if table is not None and (not second.strip() or table.has_row(second)):
        return table.refusal(path)
    if _suffix(path) == ".csv" and not first.lstrip().startswith(b"{"):
        return _plain_csv(first, path)
    if _is_text(first) and not second.lstrip().startswith(b"{"):
        return "looks like plain text, and not JSON Lines; --format text takes each line as a prompt"
    return None


def _plain_csv(first: bytes, path: str) -> str:
    """The line about a CSV of one column, or one whose first line names no columns."""
    values = _values(_decoded(first), ",")
    if len(values) == 1 and _WORD.fullmatch(values[0]):
        return _Table(",", (values[0],)).refusal(path)
    rows = f"csv.reader({_OPENED})"
    made = f'import csv, json, sys; [print(json.dumps({{"prompt": row[0]}})) for row in {rows} if row]'
    other = " (with the number of another column for 0)" if len(values) > 1 else ""
    as_it_is = "--format text takes each line as a prompt"
    return f"looks like a CSV, and not JSON Lines; {as_it_is}, or make each row one: {_python(made, path)}{other}"


@dataclass(frozen=True, slots=True)
class _Table:
    """A table of delimited values, as the line that names its columns shows it."""

    delimiter: str
    columns: tuple[str, ...]

    def __str__(self) -> str:
        kind = {"\t": "tab-separated values", ",": "a CSV"}.get(self.delimiter, f"a CSV with {self.delimiter!r}")
        return f"{kind} of {counted(len(self.columns), 'column')}"

    def has_row(self, line: bytes) -> bool:
        """True for a row of it; one whose last value goes on in the next line may have fewer values."""
        text = _decoded(line)
        values = len(_values(text, self.delimiter))
        goes_on = text.count('"') % 2 or len(line) > _LOOKED_AT_BYTES
        return 1 < values <= len(self.columns) if goes_on else values == len(self.columns)

    def refusal(self, path: str) -> str:
        """The message that it is no JSON Lines, with the command that makes JSON Lines of it."""
        return f"looks like {self}, and not JSON Lines; make each row one: {self.command(path)}"

    def command(self, path: str) -> str:
        """A command that writes it as JSON Lines."""
        likely = self.columns if len(self.columns) == 1 else _PROMPT_COLUMNS
        column = next((each for each in likely if each in self.columns), "COLUMN")
        delimiter = "" if self.delimiter == "," else f", delimiter={json.dumps(self.delimiter)}"
        rows = f"csv.DictReader({_OPENED}{delimiter})"
        made = f'import csv, json, sys; [print(json.dumps({{"prompt": row["{column}"]}})) for row in {rows}]'
        return _python(made, path) + (" (with the name of a column for COLUMN)" if column == "COLUMN" else "")


def _table(line: bytes, name: re.Pattern[str]) -> _Table | None:
    """The table whose columns this line names, each of them as `name` matches."""
    text = _decoded(line)
    for delimiter in ",\t;":
        columns = tuple(_values(text, delimiter))
        if 1 < len(columns) == len(set(columns)) and all(map(name.fullmatch, columns)):
            return _Table(delimiter, columns)
    return None


def _values(text: str, delimiter: str) -> list[str]:
    try:
        return next(csv.reader([text], delimiter=delimiter), [])
    except csv.Error:
        return []


def _decoded(line: bytes) -> str:
    return line[:_LOOKED_AT_BYTES].decode(errors="replace").rstrip("\r\n")


def _is_text(line: bytes) -> bool:
    """True for a line that can be nothing but text: it neither is JSON nor begins as an object, a list or a string."""
    text = _decoded(line).rstrip("\ufffd").strip()
    if not text or text[0] in '{["' or "\ufffd" in text or not text.replace("\t", " ").isprintable():
        return False
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return True
    return False


def _is_request(line: bytes) -> bool:
    if not line.lstrip().startswith(b"{"):
        return False
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return not _REQUEST_KEYS.isdisjoint(value)


def _python(source: str, path: str) -> str:
    return f"python3 -c {shlex.quote(source)} {_beside(path)}"


def _beside(path: str) -> str:
    """The end of a command that reads the file, and writes another beside it."""
    file = "FILE" if path == "-" else path
    return f"{shlex.quote(file)} > {shlex.quote(f'{file}.jsonl')}"


def _suffix(path: str | PurePath) -> str:
    return PurePath(path).suffix.lower()
