"""Files that are no prompt files: recognised by their first bytes, and refused in one line that says what to do."""

from __future__ import annotations

import gzip
import io
import json
import os
import shlex
import subprocess
import sys
import threading
import tracemalloc
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchmill.jobs.errors import PromptFileError
from batchmill.jobs.runtime.files import formats
from batchmill.producer.files.prompt_file import PromptFile

REQUEST = b'{"prompt":"SECRET"}\n'


def read(path: Path | str, form: str | None = None) -> list[str | None]:
    with PromptFile(str(path), form=form) as prompts:
        prompts_read = [line.request.prompt for line in prompts]
        prompts.raise_if_bad()
        return prompts_read


def refused(path: Path | str, form: str | None = None) -> str:
    """The message for a file that is refused whole, without the file's name."""
    with pytest.raises(PromptFileError) as caught:
        read(path, form)
    assert caught.value.exit_code == 2
    assert caught.value.problems == ()
    name, said = str(caught.value).split(": ", 1)
    assert name == ("stdin" if path == "-" else str(path))
    assert said.isprintable()
    assert "SECRET" not in said
    return said


def write(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def workbook() -> bytes:
    """The beginning of an .xlsx, as Excel orders its parts; the first is stored, so that byte 4 is a line feed."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as packed:
        for part in ("[Content_Types].xml", "_rels/.rels", "xl/workbook.xml"):
            info = zipfile.ZipInfo(part)
            info.extract_version = info.create_version = 10
            packed.writestr(info, "<xml/>\n" * 20)
    data = buffer.getvalue()
    assert data[4:5] == b"\n"
    return data


# --- prompts that are no JSON Lines -------------------------------------------------------------------------

#: Files that are read as JSON Lines and are something else, each with what is said of it.
NO_LINES = {
    "CSV": (b"prompt,answer\nSECRET,4\n", "looks like a CSV of 2 columns, and not JSON Lines; make each row one: "),
    "CSV of spreadsheets": (
        b"\xef\xbb\xbf\r\nPrompt text;Max\r\nSECRET;4\r\n",
        "looks like a CSV with ';' of 2 columns",
    ),
    "CSV in quotes": (b'"prompt","answer"\n"SECRET,","4"\n', "looks like a CSV of 2 columns"),
    "CSV whose value has lines": (b'id,prompt,n\n1,"SECRET\nmore",4\n', "looks like a CSV of 3 columns"),
    "CSV without rows": (b"prompt,answer", "looks like a CSV of 2 columns"),
    "CSV in Latin-1": (b"prompt,n\ncaf\xe9 SECRET,1\n", "looks like a CSV of 2 columns"),
    "TSV": (b"id\tprompt\n1\tSECRET, or not\n", "looks like tab-separated values of 2 columns"),
    "array": (b'[{"prompt":"SECRET"},\n{"prompt":"b"}]', "looks like a JSON array, and not JSON Lines; make it some: "),
    "array over lines": (b'\n[\n  {"prompt": "SECRET"}\n]\n', "looks like a JSON array"),
    "array of strings": (b' ["SECRET", "b"]', "looks like a JSON array"),
    "empty array": (b"[]", "looks like a JSON array"),
    "object over lines": (b'{\n  "prompt": "SECRET"\n}\n', "looks like JSON that is spread over lines"),
    "page": (b"<!DOCTYPE html>\n<p>SECRET", "looks like HTML or XML"),
    "workbook": (workbook(), "is an Excel workbook (.xlsx) or another file of Office, which batchmill does not"),
    "old workbook": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(99), "is an old Excel workbook"),
    "zip": (b"PK\x03\x04\n\0" + bytes(99), "is a zip archive"),
    "gzip": (gzip.compress(REQUEST), "is compressed by gzip, which batchmill does not unpack; run gunzip first"),
    "Parquet": (b"PAR1\x15\0" + bytes(99), "is a Parquet file"),
    "SQLite": (b"SQLite format 3\0" + bytes(99), "is a SQLite database"),
    "PDF": (b"%PDF-1.7\nSECRET", "is a PDF"),
    "PNG": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "is a picture"),
    "JPEG": (b"\xff\xd8\xff\xe0\0\x10JFIF\0\1", "is no text file; write a .jsonl file of it"),
    "program": (b"\x7fELF\2\1\1" + bytes(99), "is no text file"),
    "pickle": (b"\x80\x04\x95\x03\n", "is no text file"),
}


@pytest.mark.parametrize("case", NO_LINES)
@pytest.mark.parametrize("form", [None, "jsonl"])
def test_what_is_no_json_lines_is_refused_in_one_line(tmp_path: Path, case: str, form: str | None) -> None:
    data, said = NO_LINES[case]
    assert refused(write(tmp_path, "p.jsonl", data), form).startswith(said)


@pytest.mark.parametrize("case", NO_LINES)
def test_a_stream_is_recognized_too(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    data, said = NO_LINES[case]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert refused("-").startswith(said)


def test_a_csv_of_one_column_is_told_by_its_name(tmp_path: Path) -> None:
    said = refused(write(tmp_path, "p.csv", b"prompt\nSECRET\n"))
    assert said.startswith("looks like a CSV of 1 column, and not JSON Lines; make each row one: python3 -c ")
    assert read(write(tmp_path, "lines.csv", REQUEST)) == ["SECRET"]


@pytest.mark.parametrize(
    ("name", "data", "prompts"),
    [
        ("it's p.csv", b'id,prompt\r\n1,"2 + 2,\n=?"\r\n2,caf\xc3\xa9\r\n', ["2 + 2,\n=?", "caf\xe9"]),
        ("p.jsonl", b"\xef\xbb\xbfquestion;n\na;1\n", ["a"]),
        ("p.txt", b"text\tn\na,\t1\n", ["a,"]),
        ("p.json", b'[{"prompt": "a"},\n {"prompt": "b"}]', ["a", "b"]),
        ("p", b'["a", "b"]', ["a", "b"]),
        ("one.csv", b'ask\n"2 + 2,\n=?"\n\nb\n', ["2 + 2,\n=?", "b"]),
        ("unnamed.csv", b'"How, then?"\nb\n', ["How, then?", "b"]),
    ],
)
def test_the_command_that_it_names_makes_json_lines(tmp_path: Path, name: str, data: bytes, prompts: list[str]) -> None:
    path = write(tmp_path, name, data)
    command = "python3 -c " + refused(path).split("python3 -c ", 1)[1]
    subprocess.run(
        command.replace("python3", shlex.quote(sys.executable), 1), shell=True, check=True, cwd=tmp_path, timeout=60
    )
    assert path.read_bytes() == data, "the file itself is left alone"
    assert read(f"{path}.jsonl") == prompts


def test_a_column_that_nothing_tells_of_is_left_to_be_named(tmp_path: Path) -> None:
    said = refused(write(tmp_path, "p.csv", b"a,b\n1,2\n"))
    assert 'row["COLUMN"]' in said
    assert said.endswith("(with the name of a column for COLUMN)")


def test_columns_without_names_are_counted(tmp_path: Path) -> None:
    said = refused(write(tmp_path, "p.csv", b"1,SECRET?\n"))
    assert said.startswith("looks like a CSV, and not JSON Lines; --format text takes each line as a prompt, or make")
    assert said.endswith("(with the number of another column for 0)")


@pytest.mark.parametrize(
    "data", [b"SECRET, this is\n", b"prompt\nSECRET", b"a,a\n1,2\n", b"\n1,2\n", "caf\xe9".encode()]
)
def test_plain_text_is_told_how_to_be_read(tmp_path: Path, data: bytes) -> None:
    said = refused(write(tmp_path, "p.jsonl", data))
    assert said == "looks like plain text, and not JSON Lines; --format text takes each line as a prompt"
    assert read(tmp_path / "p.jsonl", "text") == data.decode().strip().splitlines()


@pytest.mark.parametrize(
    "data", [b"a,b\n{}\n", b"[[]]\n", b"12\n", b"null\n", b"SECRET\n" + REQUEST, b"caf\xe9 SECRET\n", b"\x01\x02\n"]
)
def test_what_looks_like_nothing_is_told_line_by_line(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(PromptFileError) as caught:
        read(write(tmp_path, "p.jsonl", data))
    assert caught.value.problems


# --- text ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (REQUEST, "looks like JSON Lines and is named .txt; --format jsonl reads it so, --format text takes each line"),
        (b'\n{"messages":[{"role":"user","content":"SECRET"}]}', "looks like JSON Lines"),
        (b'{"custom_id":"a","body":{"prompt":"SECRET"}}\n', "looks like JSON Lines"),
        (b"prompt,answer\nSECRET,b\n", "looks like a CSV of 2 columns; --format text takes each line as a prompt, as"),
        (b"id\tprompt\n1\tSECRET\n", "looks like tab-separated values of 2 columns; --format text"),
        (workbook(), "is an Excel workbook"),
    ],
)
def test_text_that_looks_like_something_else_is_refused(tmp_path: Path, data: bytes, said: str) -> None:
    assert refused(write(tmp_path, "p.txt", data)).startswith(said)


@pytest.mark.parametrize(
    "lines",
    [
        ["Hello, how are you?", "Write a poem, please."],
        ["Yes,no", "one", "two"],
        ["one,two,three"],
        ['{"a": 1}', '{"prompt": "later"}'],
        ["{broken"],
        ['["a", "b"]'],
        ["<html>", "</html>"],
        ["PAR1 is the name of it"],
        ["name: a; b"],
    ],
    ids=str,
)
def test_text_is_what_may_be_text(tmp_path: Path, lines: list[str]) -> None:
    assert read(write(tmp_path, "p.txt", "\n".join(lines).encode())) == lines


def test_format_text_takes_every_line_as_it_is(tmp_path: Path) -> None:
    for name in ("p.txt", "p.jsonl", "p.csv"):
        for data in (REQUEST * 2, b"prompt,answer\na,b\n", b"[\n{\n"):
            lines = data.decode().splitlines()
            assert read(write(tmp_path, name, data), "text") == lines
    assert "gzip" in refused(write(tmp_path, "p.txt", gzip.compress(b"a")), "text")


def test_format_text_waits_for_no_second_line(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    was_read = threading.Event()

    def write_lines() -> None:
        with pipe.open("wb", buffering=0) as out:
            out.write(b"a,b\n")
            assert was_read.wait(300)

    writer = threading.Thread(target=write_lines)
    writer.start()
    with PromptFile(str(pipe), form="text") as prompts:
        lines = iter(prompts)
        assert next(lines).request.prompt == "a,b"
        was_read.set()
        assert list(lines) == []
    writer.join()


def test_format_jsonl_reads_a_txt_file_as_requests(tmp_path: Path) -> None:
    assert read(write(tmp_path, "p.txt", REQUEST), "jsonl") == ["SECRET"]


@given(st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1), min_size=1, max_size=4))
def test_any_text_is_taken_or_told_of(lines: list[str]) -> None:
    first, second = (f"{each}\n".encode() for each in [*lines, ""][:2])
    for form in formats.PROMPTS:
        said = formats.mistaken(first, second, read_as=form, path="p.txt")
        assert said is None or said.startswith("looks like ")
        as_json = json.dumps({"prompt": lines[0]}).encode()
        assert (formats.mistaken(as_json, second, read_as=form, path="p.txt") is None) == (form == "jsonl")


def test_no_more_than_the_beginning_is_read(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    gave_up = threading.Event()

    def write_rows() -> None:
        with pipe.open("wb", buffering=0) as out:
            out.write(b"prompt,answer\n")
            try:
                for _ in range(1 << 10):
                    out.write(b"SECRET,b\n" * (1 << 14))
            except BrokenPipeError:
                gave_up.set()

    writer = threading.Thread(target=write_rows)
    writer.start()
    tracemalloc.start()
    try:
        assert refused(pipe).startswith("looks like a CSV")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    writer.join(300)
    assert gave_up.is_set()
    assert peak < 4 << 20
