"""Sources of prompts: files, pipes and standard input; anything else is refused at once."""

from __future__ import annotations

import hashlib
import io
import os
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from batchmill.jobs.errors import PromptFileError
from batchmill.producer.files.prompt_file import PromptFile
from tests.support.prompt_files import GOOD, error, requests, write


@pytest.fixture
def from_stdin(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    def set_stdin(data: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))

    return set_stdin


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "holds no prompts"),
        (b"\xef\xbb\xbf", "holds no prompts"),
        (b"\n\r\n  \n", "holds no prompts"),
        ('{"prompt":"a"}'.encode("utf-16"), "is UTF-16"),
        (b"\xfe\xff" + '{"prompt":"a"}'.encode("utf-16-be"), "is UTF-16"),
        ('{"prompt":"a"}'.encode("utf-16-le"), "looks like UTF-16; text is read as UTF-8, so convert it: "),
        ('{"prompt":"a"}'.encode("utf-16-be"), "looks like UTF-16"),
        ('{"prompt":"a"}'.encode("utf-32"), "is UTF-32"),
        (b"\x1f\x8b\x08\0", "is compressed by gzip, which batchmill does not unpack; run gunzip first"),
        (b"\x28\xb5\x2f\xfd\0", "run zstd -d first"),
        (b"PK\x03\x04", "is a zip archive"),
        (b"BZh91AY&SY", "run bunzip2 first"),
        (b"\xfd7zXZ\0", "run unxz first"),
    ],
)
@pytest.mark.parametrize("name", ["p.jsonl", "p.txt"])
def test_a_file_that_is_no_prompt_file_is_refused(tmp_path: Path, name: str, data: bytes, said: str) -> None:
    path = write(tmp_path, data, name)
    caught = error(path)
    assert str(caught).startswith(f"{path}: {said}" if said.startswith(("is", "looks", "holds")) else path)
    assert said in str(caught)
    assert caught.exit_code == 2


def test_text_that_begins_like_an_archive_is_text(tmp_path: Path) -> None:
    prompts = requests(write(tmp_path, b"BZhang\nPKZIP", "p.txt"))
    assert [each.prompt for each in prompts] == ["BZhang", "PKZIP"]


def test_what_cannot_be_opened_is_refused_at_once(tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for path, said in (
        (tmp_path / "missing.jsonl", "cannot be read: No such file or directory"),
        (loop, "cannot be read: Too many levels of symbolic links"),
        (tmp_path, "is a folder"),
        ("/dev/zero", "is neither a file nor a pipe"),
        ("/dev/null", "is neither a file nor a pipe"),
    ):
        with pytest.raises(PromptFileError, match=f"{path}: {said}"):
            PromptFile(str(path))


def test_a_socket_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("s")
        with pytest.raises(PromptFileError, match="s: is neither a file nor a pipe"):
            PromptFile("s")


@pytest.mark.parametrize("change", [GOOD, b"", b'{"prompt":"else"}\n'])
def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, change: bytes) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(GOOD)
    os.utime(path, ns=(0, 0))
    with PromptFile(str(path)) as prompts:
        lines = iter(prompts)
        next(lines)
        path.write_bytes(change)
        with pytest.raises(PromptFileError, match="changed while it was being read"):
            list(lines)


def test_a_pipe_is_read_as_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    was_read = threading.Event()

    def write_lines() -> None:
        with path.open("wb", buffering=0) as out:
            out.write(GOOD)
            assert was_read.wait(10)
            out.write(b'{"prompt"')
            out.write(b':"last"}')

    writer = threading.Thread(target=write_lines)
    writer.start()
    with PromptFile(str(path)) as prompts:
        lines = iter(prompts)
        assert next(lines).request.prompt == "fine"
        was_read.set()
        assert [line.request.prompt for line in lines] == ["last"]
    writer.join()
    assert prompts.sha256 == hashlib.sha256(GOOD + b'{"prompt":"last"}').hexdigest()


def test_a_dash_reads_standard_input(from_stdin: Callable[[bytes], None]) -> None:
    from_stdin(GOOD + b'{"prompt":"b"}')
    with PromptFile("-") as prompts:
        assert [line.request.prompt for line in prompts] == ["fine", "b"]
        assert prompts.name == "stdin"
    assert not sys.stdin.closed
    from_stdin(b"\n{x")
    assert error("-").problems == ("stdin:2: not JSON: Expecting property name enclosed in double quotes at column 2",)
    from_stdin(b"")
    assert str(error("-")) == "stdin: holds no prompts"


def test_a_closed_standard_input_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(PromptFileError, match="stdin: is closed"):
        PromptFile("-")


def test_a_stream_that_breaks_is_an_error_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(io.RawIOBase):
        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(Broken())))
    assert str(error("-")) == "stdin: cannot be read: Input/output error"
