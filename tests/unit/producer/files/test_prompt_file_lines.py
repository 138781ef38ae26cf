"""Bytes of a prompt file: line ends, byte order marks, text files, long lines, and constant memory."""

from __future__ import annotations

import hashlib
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from batchmill.jobs.requests.generation import GenerationRequest
from batchmill.jobs.requests.request import DEFAULT_LINE_BYTES as MAX_LINE_BYTES
from batchmill.producer.files.prompt_file import PromptFile
from tests.support.prompt_files import GOOD, error, requests, write


def test_bom_crlf_blank_lines_and_a_missing_last_newline_are_fine(tmp_path: Path) -> None:
    data = b'\xef\xbb\xbf{"prompt":"a"}\r\n\r\n \t\xe3\x80\x80\n' + b' {"prompt":"b"} \r\n\n{"prompt":"c"}'
    with PromptFile(write(tmp_path, data)) as prompts:
        assert [(line.number, line.request.index, line.request.prompt) for line in prompts] == [
            (1, 0, "a"), (4, 1, "b"), (6, 2, "c"),
        ]  # fmt: skip


def test_a_byte_order_mark_is_one_at_byte_0_alone(tmp_path: Path) -> None:
    prompts = requests(write(tmp_path, b"ab\n\xef\xbb\xbfc", "p.txt"))
    assert [each.prompt for each in prompts] == ["ab", "\ufeffc"]


@pytest.mark.parametrize("splitter", ["\u2028", "\u2029", "\x85", "\x7f"])
def test_unicode_line_ends_do_not_split_a_line(tmp_path: Path, splitter: str) -> None:
    data = json.dumps({"prompt": f"a{splitter}b"}, ensure_ascii=False).encode() + b"\n" + GOOD
    assert [each.prompt for each in requests(write(tmp_path, data))] == [f"a{splitter}b", "fine"]


def test_a_byte_offset_counts_from_the_files_first_byte(tmp_path: Path) -> None:
    overlong = b"x" * (MAX_LINE_BYTES + 99)
    caught = error(write(tmp_path, b"\xef\xbb\xbf" + GOOD + b"\r\n\xff\n" + overlong + b"\n\xfe"))
    first, _, last = caught.problems
    assert first.endswith(":3: not UTF-8: byte 23 is 0xff")
    assert last.endswith(f":5: not UTF-8: byte {25 + MAX_LINE_BYTES + 100} is 0xfe")


def test_a_txt_file_has_one_prompt_per_line_used_as_it_is(tmp_path: Path) -> None:
    data = 'one\r\n\n \u3000 \n {"prompt": "two"} \nthr\ree\u2028\x1b\n\nlast'.encode()
    prompts = requests(write(tmp_path, data, "Prompts.TXT"))
    assert [each.prompt for each in prompts] == ["one", ' {"prompt": "two"} ', "thr\ree\u2028\x1b", "last"]
    assert [each.custom_id for each in prompts] == [f"request-{index}" for index in range(4)]
    assert prompts[0] == GenerationRequest(0, "request-0", "one")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"SECRET a\0", "holds a NUL character"),
        (b"caf\xe9", "not UTF-8: byte 3 is 0xe9"),
        (b"a" * (MAX_LINE_BYTES + 1), "longer than 16777216 bytes; raise the setting max_line_bytes to allow it"),
    ],
)
def test_a_bad_line_of_text_is_refused(problem: Callable[..., str], data: bytes, said: str) -> None:
    assert problem(data, name="p.txt") == said


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
@pytest.mark.parametrize("begin", [b"", b"\xef\xbb\xbf"])
def test_a_line_may_have_16_mebibytes_and_no_byte_more(tmp_path: Path, begin: bytes, end: bytes) -> None:
    most = b"a" * MAX_LINE_BYTES
    prompts = requests(write(tmp_path, begin + most + b"\r\n" + most + b"\nlast" + end, "p.txt"))
    assert [len(each.prompt or "") for each in prompts] == [MAX_LINE_BYTES, MAX_LINE_BYTES, 4]
    assert len(requests(write(tmp_path, begin + most + end, "p.txt"))) == 1
    for more in (1, 2, 3, 4, 7, 100):
        caught = error(write(tmp_path, begin + most + b"a" * more + end + b"\n\nlast", "p.txt"))
        (text,) = caught.problems
        assert text.endswith(":1: longer than 16777216 bytes; raise the setting max_line_bytes to allow it")


def test_an_endless_line_is_skipped_without_holding_it(tmp_path: Path) -> None:
    path = tmp_path / "endless.jsonl"
    with path.open("wb") as out:
        out.write(GOOD + b'{"prompt":"')
        out.truncate(64 << 20)
    with path.open("ab") as out:
        out.write(b'"}\nbad\n' + GOOD)
    tracemalloc.start()
    try:
        caught = error(str(path), max_line_bytes=1 << 20)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert [text.removeprefix(f"{path}:").split(" ")[0] for text in caught.problems] == ["2:", "3:"]
    assert peak < 6 << 20


def test_a_long_file_is_read_in_constant_memory(tmp_path: Path) -> None:
    path = write(tmp_path, json.dumps({"prompt": "a" * 1000}).encode().join([b"\n"] * 5_001))
    tracemalloc.start()
    try:
        with PromptFile(path) as prompts:
            assert sum(1 for _ in prompts) == 5_000
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


def test_the_hash_is_of_the_files_bytes(tmp_path: Path) -> None:
    data = b"\xef\xbb\xbf" + GOOD + b"\r\n\n" + b"x" * (3 * MAX_LINE_BYTES) + b"\n" + GOOD
    with PromptFile(write(tmp_path, data)) as prompts:
        list(prompts)
        assert prompts.sha256 == hashlib.sha256(data).hexdigest()
        assert prompts.name == "prompts.jsonl"
