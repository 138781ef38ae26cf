"""Lines that are no plain JSON: each is refused with the reason and the column."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from batchmill.jobs.requests.request import DEFAULT_LINE_BYTES as MAX_LINE_BYTES
from tests.support.prompt_files import requests, write

#: Each with its message.
BAD_JSON: list[tuple[bytes, str]] = [
    (b'{"prompt":"SECRET"', "not JSON: Expecting ',' delimiter at column 19"),
    (b"  {SECRET}", "not JSON: Expecting property name enclosed in double quotes at column 4"),
    (b'{"prompt":"SECRET\t"}', "not JSON: Invalid control character at column 18"),
    (b'{"prompt":"SECRET', "not JSON: Unterminated string starting at column 11"),
    (b'{"prompt":"\\x SECRET"}', "not JSON: Invalid \\escape at column 12"),
    (b"[SECRET", "not JSON: Expecting value at column 2"),
    (b'{"prompt":"SECRET"} {"prompt":"x"}', "not JSON: more text after the value, at column 20"),
    (b'{"prompt":"a"}\r{"prompt":"b"}', "not JSON: more text after the value, at column 15"),
    (b'[["SECRET"]]', "must be a JSON object, not a list"),
    (b'"SECRET"', "must be a JSON object, not a string"),
    (b"null", "must be a JSON object, not null"),
    (b"1", "must be a JSON object, not a number"),
    (b'{"prompt":"SECRET\xff"}', "not UTF-8: byte 17 is 0xff"),
    (b'\xef\xbb\xbf{"prompt":"\xc3("}', "not UTF-8: byte 14 is 0xc3"),
    (b'{"prompt":"\xed\xa0\x80"}', "not UTF-8: byte 11 is 0xed"),
    (b'{"prompt":"a","prompt":"b"}', "has the key 'prompt' twice in one object"),
    (b'{"prompt":"a","metadata":{"k":1,"j":2,"k":1}}', "has the key 'k' twice in one object"),
    (b'{"prompt":"a","temperature":NaN}', "not JSON: NaN is not a JSON number"),
    (b'{"prompt":"a","temperature":-Infinity}', "not JSON: -Infinity is not a JSON number"),
    (b'{"prompt":"a","metadata":[1e400]}', "holds a number that is too large for a float"),
    (b'{"prompt":"a","seed":' + b"1" * 5000 + b"}", "holds a number of more than 4300 digits"),
    (b'{"prompt":"SECRET\0"}', "holds a NUL character at column 18"),
    (b'{"prompt":"SECRET\\u0000"}', "holds a NUL character (\\u0000)"),
    (b'{"prompt":"SECRET\\ud83d"}', "holds half a surrogate pair (\\ud83d)"),
    (b'{"prompt":"a","metadata":{"\\uDE00":1}}', "holds half a surrogate pair (\\ude00)"),
    (b'{"prompt":"a","metadata":' + b'{"a":' * 64 + b"1" + b"}" * 65, "nested deeper than 64 levels"),
    (b"[" * 100_000, "nested deeper than 64 levels"),
]


@pytest.mark.parametrize(("line", "said"), BAD_JSON, ids=[said for _, said in BAD_JSON])
def test_a_line_that_is_no_plain_json_is_refused(problem: Callable[..., str], line: bytes, said: str) -> None:
    assert problem(line) == said


def test_nesting_of_64_levels_and_brackets_in_text_are_fine(tmp_path: Path) -> None:
    nested = '{"prompt":"' + '[{\\"' * 500 + '","metadata":' + '{"a":' * 62 + "{}" + "}" * 63
    [request] = requests(write(tmp_path, nested.encode()))
    assert request.prompt == '[{"' * 500


def test_a_long_unfinished_string_of_escapes_is_refused_at_once(problem: Callable[..., str]) -> None:
    line = b"[" * 65 + b'"' + b'\\"' * (MAX_LINE_BYTES // 2 - 100)
    assert problem(line) == "nested deeper than 64 levels"


def test_escaped_pairs_and_escaped_backslashes_are_text(tmp_path: Path) -> None:
    [request] = requests(write(tmp_path, b'{"prompt":"\\ud83d\\ude00 \\\\u0000 \\u4f60"}'))
    assert request.prompt == "\U0001f600 \\u0000 你"
