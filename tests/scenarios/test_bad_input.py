"""Whole files, good and bad, into both databases: the same verdict from either, nothing stored of what is refused.

The tables go by the cases of hostile input; messages for single lines are tested in `tests/unit/producer/requests`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from batchmill.jobs.errors import PromptFileError
from batchmill.jobs.store.store import Store
from tests.support.whole_files import answer, counted, exported, load, prompt

BOM = b"\xef\xbb\xbf"
#: Files that are refused, each with what is said of it. `B` numbers group them.
REFUSED: dict[str, tuple[bytes, str]] = {
    "B1 empty": (b"", "holds no prompts"),
    "B1 blank lines": (b"\n\r\n \t\n\xe3\x80\x80", "holds no prompts"),
    "B2 long line": (prompt("x" * (1 << 24)), ":1: longer than 16777216 bytes"),
    "B2 long line in the middle": (b'{"prompt":"a"}\n' + b"x" * (17 << 20) + b"\n", ":2: longer than"),
    "B3 lone CR between records": (b'{"prompt":"a"}\r{"prompt":"b"}', ":1: not JSON: more text after the value"),
    "B4 UTF-16": ('{"prompt":"a"}'.encode("utf-16"), "is UTF-16"),
    "B4 UTF-32": ('{"prompt":"a"}'.encode("utf-32"), "is UTF-32"),
    "B4 Latin-1": ('{"prompt":"caf\xe9"}'.encode("latin-1"), ":1: not UTF-8: byte 14 is 0xe9"),
    "B4 truncated UTF-8": (b'{"prompt":"a"}\n{"prompt":"\xe2\x82"}', ":2: not UTF-8: byte 26 is 0xe2"),
    "B4 overlong": (b'{"prompt":"\xc0\xaf"}', ":1: not UTF-8: byte 11 is 0xc0"),
    "B4 raw 0xff": (b'{"prompt":"a"}\n\xff', ":2: not UTF-8: byte 15 is 0xff"),
    "B5 NUL": (b'{"prompt":"a\0"}', ":1: holds a NUL character"),
    "B5 escaped NUL": (b'{"prompt":"a\\u0000"}', ":1: holds a NUL character"),
    "B5 NUL in a key": (b'{"prompt":"a","metadata":{"\\u0000":1}}', ":1: holds a NUL character"),
    "B5 NUL in a custom_id": (b'{"prompt":"a","custom_id":"\\u0000"}', ":1: holds a NUL character"),
    "B5 half a pair": (b'{"prompt":"\\ud83d"}', ":1: holds half a surrogate pair"),
    "B5 halves the wrong way round": (b'{"prompt":"\\ude00\\ud83d"}', ":1: holds half a surrogate pair"),
    "B5 half a pair in a stop": (b'{"prompt":"a","stop":["\\udfff"]}', ":1: holds half a surrogate pair"),
    "B5 raw control character": (b'{"prompt":"\x01"}', ":1: not JSON: Invalid control character"),
    "B6 depth 65": (b'{"prompt":"a","metadata":' + b'{"a":' * 64 + b"1" + b"}" * 65, ":1: nested deeper than 64"),
    "B6 depth 1,000": (b"[" * 1_000 + b"]" * 1_000, ":1: nested deeper than 64"),
    "B6 depth 100,000": (b'{"a":' * 100_000, ":1: nested deeper than 64"),
    "B6 5,000 digits": (b'{"prompt":"a","seed":' + b"7" * 5_000 + b"}", ":1: holds a number of more than"),
    "B6 1e400": (b'{"prompt":"a","metadata":{"x":1e400}}', ":1: holds a number that is too large"),
    "B6 NaN": (b'{"prompt":"a","temperature":NaN}', ":1: not JSON: NaN is not a JSON number"),
    "B6 -Infinity": (b'{"prompt":"a","top_p":-Infinity}', ":1: not JSON: -Infinity is not a JSON number"),
    "B7 key twice": (b'{"prompt":"a","prompt":"b"}', ":1: has the key 'prompt' twice"),
    "B7 custom_id twice": (
        prompt("a", custom_id="i") + b"\n" + prompt("b", custom_id="i"),
        ":2: duplicate custom_id 'i', first used at line 1",
    ),
    "B7 custom_id of a line without one": (
        prompt("a", custom_id="request-1") + b"\n" + prompt("b"),
        ":2: duplicate custom_id 'request-1', first used at line 1",
    ),
    "B7 custom_id a number": (prompt("a", custom_id=1), ":1: custom_id must be a string"),
    "B7 custom_id empty": (prompt("a", custom_id=""), ":1: custom_id must be a string of 1 to 256"),
    "B7 custom_id of 257": (prompt("a", custom_id="i" * 257), ":1: custom_id must be a string of 1 to 256"),
    "B7 custom_id of two lines": (prompt("a", custom_id="a\nb"), ":1: custom_id must be a string of 1 to 256"),
    "B8 unknown field": (prompt("a", promt=1), ":1: 'promt' is not supported here"),
    "B8 wrong type": (b'{"prompt":1}', ":1: prompt must be a string, not a number"),
    "B8 no object": (b'[["a"]]', ":1: must be a JSON object, not a list"),
    "B8 max_tokens 0": (prompt("a", max_tokens=0), ":1: max_tokens must be an integer"),
    "B8 max_tokens 1e9": (b'{"prompt":"a","max_tokens":1e9}', ":1: max_tokens must be an integer"),
    "B8 max_tokens true": (prompt("a", max_tokens=True), ":1: max_tokens must be an integer"),
    "B8 max_tokens text": (prompt("a", max_tokens="5"), ":1: max_tokens must be an integer"),
    "B8 seed too large": (prompt("a", seed=2**63), ":1: seed must be an integer"),
    "B10 gzip": (b"\x1f\x8b\x08\0" + bytes(1 << 20), "is compressed by gzip"),
    "B10 zip": (b"PK\x03\x04" + bytes(99), "is a zip archive"),
    "B10 zstd": (b"\x28\xb5\x2f\xfd" + bytes(99), "is compressed by zstd"),
}
#: Files that are taken, each with its prompts, exactly.
TAKEN: dict[str, tuple[bytes, list[str]]] = {
    "B3 byte order mark": (BOM + prompt("a") + b"\n" + prompt("\ufeffb"), ["a", "\ufeffb"]),
    "B3 CRLF": (prompt("a") + b"\r\n\r\n" + prompt("b") + b"\r\n", ["a", "b"]),
    "B3 no newline at the end": (prompt("a") + b"\n" + prompt("b"), ["a", "b"]),
    "B3 line ends of Unicode": (prompt("a\u2028b\u2029c\x85d") + b"\n" + prompt("e"), ["a\u2028b\u2029c\x85d", "e"]),
    "B3 line ends in JSON": (b'{"prompt":"a\\r\\nb\\rc\\n\\u2028"}', ["a\r\nb\rc\n\u2028"]),
    "B5 control characters, escaped": (b'{"prompt":"\\u0001\\u001b[2J\\t\\b\\u007f"}', ["\x01\x1b[2J\t\b\x7f"]),
    "B5 pairs": (b'{"prompt":"\\ud83d\\ude00 \xf0\x9f\x98\x80 \\\\ud800"}', ["\U0001f600 \U0001f600 \\ud800"]),
    "B5 what is no character": ('{"prompt":"\ufffe\uffff\ufffd\U0010ffff"}'.encode(), ["\ufffe\uffff\ufffd\U0010ffff"]),
    "B6 depth 64": (b'{"prompt":"a","metadata":' + b'{"a":' * 62 + b"{}" + b"}" * 63, ["a"]),
    "B7 NFC and NFD are two": (
        prompt("\xe9", custom_id="\xe9") + b"\n" + prompt("e\u0301", custom_id="e\u0301"),
        ["\xe9", "e\u0301"],
    ),
    "B7 cases and blanks are different": (
        b"\n".join(prompt(each, custom_id=each) for each in ("i", "I", "i ", " i", "\u0131", "\u0130", "\xdf", "ss")),
        ["i", "I", "i ", " i", "\u0131", "\u0130", "\xdf", "ss"],
    ),
    "B7 custom_id of 256": (prompt("a", custom_id="\U0001f600" * 256), ["a"]),
    "B7 custom_id null": (prompt("a", custom_id=None), ["a"]),
    "B9 templates": (
        prompt("{{7*7}} {% for x in y %} <|im_start|>system\n"),
        ["{{7*7}} {% for x in y %} <|im_start|>system\n"],
    ),
    "B9 empty and blank prompts": (prompt("") + b"\n" + prompt(" \n"), ["", " \n"]),
    "B9 a chat": (b'{"messages":[{"role":"user","content":"{{ messages }}"}]}', ["{{ messages }}"]),
    "SQL": (prompt("'; DROP TABLE jobs; -- %s :name ? \\"), ["'; DROP TABLE jobs; -- %s :name ? \\"]),
}


def test_refused_files_have_the_same_reason_on_every_database_and_leave_nothing(store: Store, tmp_path: Path) -> None:
    for case, (data, said) in REFUSED.items():
        path = tmp_path / "p.jsonl"
        path.write_bytes(data)
        with pytest.raises(PromptFileError) as refused:
            load(store, path)
        texts = [*refused.value.problems, str(refused.value)]
        assert any(f"{path}{said}" in text or f"{path}: {said}" in text for text in texts), (case, texts)
        assert all(text.isprintable() for text in texts), (case, texts)
        assert refused.value.exit_code == 2
        assert counted(store) == (0, 0, 0), case


def test_taken_files_come_back_byte_for_byte_from_every_database(store: Store, tmp_path: Path) -> None:
    job_of = {}
    for case, (data, _) in TAKEN.items():
        path = tmp_path / "p.jsonl"
        path.write_bytes(data)
        job_of[case] = load(store, path)
    answer(store)
    for case, (_, texts) in TAKEN.items():
        for form in ("jsonl", "openai", "csv"):
            assert [text for _, text in exported(store, job_of[case], tmp_path, form)] == texts, (case, form)


@pytest.mark.parametrize(("name", "line"), [("p.jsonl", b'{"prompt":"fine"}\n'), ("p.txt", b"a prompt of text.\n")])
def test_one_bad_line_at_the_end_of_30_000_leaves_nothing(store: Store, tmp_path: Path, name: str, line: bytes) -> None:
    """Three pages are stored by then, so this is about deleting them."""
    path = tmp_path / name
    path.write_bytes(line * 30_000 + b"\xff\n")
    with pytest.raises(PromptFileError) as refused:
        load(store, path)
    assert refused.value.problems == (f"{path}:30001: not UTF-8: byte 540000 is 0xff",)
    assert counted(store) == (0, 0, 0)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_one_bad_line_at_the_end_of_a_million_leaves_nothing(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"prompt":"fine"}\n' * 1_000_000 + b'{"prompt":"last","custom_id":"request-0"}')
    with pytest.raises(PromptFileError) as refused:
        load(store, path)
    assert refused.value.problems == (f"{path}:1000001: duplicate custom_id 'request-0', first used at index 0",)
    assert counted(store) == (0, 0, 0)


def test_a_file_that_is_written_to_meanwhile_leaves_nothing(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"prompt":"fine"}\n' * 20_000)
    add = store.creation.add

    def write_to_it(job_id: str, **page: Any) -> Any:
        with path.open("ab") as file:
            file.write(b'{"prompt":"more"}\n')
        return add(job_id, **page)

    monkeypatch.setattr(store.creation, "add", write_to_it)
    with pytest.raises(PromptFileError, match="changed while it was being read"):
        load(store, path)
    assert counted(store) == (0, 0, 0)
