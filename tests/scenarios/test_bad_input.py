"""Whole files, good and bad, into both databases: the same verdict from either, nothing stored of what is refused.

The table goes by the cases of hostile input; what is said of single lines is in test_prompts.
"""

from __future__ import annotations

import csv
import io
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, event

from batchmill.jobs.configuration.settings import load_settings
from batchmill.jobs.errors import PromptFileError, UsageError
from batchmill.jobs.requests.generation import Choice
from batchmill.jobs.requests.request import Output, RequestKey
from batchmill.jobs.store.leases.lease import BatchReport
from batchmill.jobs.store.store import Store
from batchmill.producer.files import prompt_file as prompts_module
from batchmill.producer.files.export import errors_path, export
from batchmill.producer.files.prompt_file import PromptFile
from batchmill.producer.submit import Submission, load_job
from tests.support.paths import ROOT
from tests.support.store import mill

SETTINGS = load_settings()  # read before any test changes the environment
MOST_BYTES = 200_000_000
BOM = b"\xef\xbb\xbf"


def load(store: Store, path: Path) -> str:
    return load_job(Submission(str(path), "echo"), store=store, settings=SETTINGS)[0]


def counted(store: Store) -> tuple[int, int, int]:
    """The numbers of jobs, batches and requests, in any state."""
    return mill.rows(store, "jobs"), mill.rows(store, "batches"), mill.rows(store, "requests")


def answer(store: Store) -> None:
    """Answers every pending request with its own prompt."""
    who = mill.session(store)
    while found := mill.claim(store, who):
        for claimed in found:
            outputs = [
                Output(
                    RequestKey(claimed.lease.job_id, each.index),
                    (
                        Choice(
                            each.prompt if each.prompt is not None else (each.messages or ({},))[-1]["content"], "stop"
                        ),
                    ),
                )
                for each in claimed.requests
            ]
            mill.save(store, who, [BatchReport(claimed.lease, outputs=outputs)])


def exported(store: Store, job_id: str, folder: Path, form: str) -> list[tuple[str, str]]:
    """The custom_id and the text of every output, as a reader of the file finds them."""
    out = folder / f"out.{form}"
    export(store, store.jobs.job(job_id), out=out, form=form, only="all")
    if form == "csv":
        rows = csv.DictReader(io.StringIO(out.read_bytes().decode(), newline=""))
        return [(row["custom_id"], row["text"]) for row in rows]
    lines = [json.loads(line) for line in out.read_bytes().split(b"\n")[:-1]]
    if form == "jsonl":
        return [(line["custom_id"], line["text"]) for line in lines]
    first = [line["response"]["body"]["choices"][0] for line in lines]
    texts = [each["message"]["content"] if "message" in each else each["text"] for each in first]
    return [(line["custom_id"], text) for line, text in zip(lines, texts, strict=True)]


def prompt(text: str, **more: Any) -> bytes:
    return json.dumps({"prompt": text, **more}, ensure_ascii=False).encode()


# --- the table ----------------------------------------------------------------------------------------------

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


# --- hostile names ------------------------------------------------------------------------------------------

HOSTILE = [
    "../../../etc/passwd", "/etc/passwd", "..", ".", "~", "CON", "a/b", "a\\b", "-o", "--help", "$(reboot)", "`reboot`",
    "'; DROP TABLE requests; --", '"; DELETE FROM jobs; --', "' OR '1'='1", "%s%n", "%(index)s", ":index", "?", "{0}",
    "{{7*7}}", "<script>", "=1+1", "NULL", "\U0001f600", "\u202eabc", "\u200b", "\ufeff", "a" * 256,
]  # fmt: skip


@pytest.fixture
def statements() -> Iterator[list[str]]:
    """The text of every statement that reaches a database."""
    seen: list[str] = []

    def see(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        seen.append(statement)

    event.listen(Engine, "before_cursor_execute", see)
    yield seen
    event.remove(Engine, "before_cursor_execute", see)


def test_hostile_names_reach_no_path_and_no_text_of_sql(store: Store, tmp_path: Path, statements: list[str]) -> None:
    folder = tmp_path / "only"
    folder.mkdir()
    path = folder / "p.jsonl"
    marked = [f"{each[:250]}|{place}|" for place, each in enumerate(HOSTILE)]  # so that each is found if it is there
    path.write_bytes(b"\n".join(prompt(each, custom_id=each) for each in [*HOSTILE, *marked]))
    asked = Submission(str(path), "echo", name=marked[12], command=marked[13], idempotency_key=marked[14])
    job_id, _ = load_job(asked, store=store, settings=SETTINGS)
    with pytest.raises(UsageError):
        load_job(asked, store=store, settings=SETTINGS)
    path.write_bytes(b"\n".join(prompt(each, custom_id=each) for each in [*marked, *marked]))
    with pytest.raises(PromptFileError):
        load(store, path)  # reads by custom_id
    answer(store)
    for form in ("jsonl", "openai", "csv"):
        assert exported(store, job_id, folder, form) == [(each, each) for each in [*HOSTILE, *marked]]
    assert {each.name for each in folder.iterdir()} == {
        "p.jsonl", "out.jsonl", "out.csv", "out.openai", errors_path(folder / "out.openai").name,
    }  # fmt: skip
    assert len(statements) > 20
    assert not [text for text in statements if any(each in text for each in marked)]
    assert mill.rows(store, "jobs") == 1


@pytest.mark.parametrize(
    "name", [b"\xff\xfe.jsonl", b"a\nb.jsonl", b"\x1b[2J.jsonl", "\u202e.jsonl".encode(), b"%s.jsonl"]
)
def test_a_file_may_have_any_name(store: Store, tmp_path: Path, name: bytes) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    path.write_bytes(b'{"prompt":"a"}\n')
    job = store.jobs.job(load(store, path))
    assert job.file_name.isprintable()
    path.write_bytes(b"[bad\n")
    with pytest.raises(PromptFileError) as refused:
        load(store, path)
    assert refused.value.problems[0].isprintable()
    assert refused.value.problems[0].endswith(f"{job.file_name}:1: not JSON: Expecting value at column 2")


# --- any bytes ----------------------------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=40)
CUSTOM_ID = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=256)
NEARLY = st.sampled_from([
    b'{"prompt":"a"}', b'{"prompt":"\\u0000"}', b'{"custom_id":"a","prompt":"b"}', b"\n", b"\r\n", BOM, b"\xff", b"\0",
    b'{"messages":[{"role":"user","content":"a"}]}', b'"', b"{", b"}", b"\xe2\x80\xa8", b"1e999", b"\\ud800", b" ",
])  # fmt: skip
BYTES = st.binary(max_size=200) | st.lists(NEARLY | st.binary(max_size=3), max_size=12).map(b"".join)


def fuzz(examples: int) -> Callable[[Any], Any]:
    return settings(max_examples=examples, suppress_health_check=[HealthCheck.function_scoped_fixture])


def check_any_bytes(store: Store, path: Path, data: bytes) -> None:
    """Taken whole or refused whole; whatever else is raised fails the test."""
    path.write_bytes(data)
    before = counted(store)
    try:
        job_id = load(store, path)
    except UsageError:  # whose exit code is 2
        assert counted(store) == before
    else:
        total = store.jobs.job(job_id).counts.total
        assert total > 0
        assert counted(store) == (before[0] + 1, before[1] + 1, before[2] + total)


def check_round_trip(store: Store, folder: Path, records: list[tuple[str, str]], ascii_only: bool) -> None:
    path = folder / "p.jsonl"
    lines = [json.dumps({"custom_id": name, "prompt": text}, ensure_ascii=ascii_only) for name, text in records]
    path.write_bytes("\n".join(lines).encode())
    job_id = load(store, path)
    answer(store)
    for form in ("jsonl", "openai", "csv"):
        assert exported(store, job_id, folder, form) == records


RECORDS = st.lists(st.tuples(CUSTOM_ID, TEXT), min_size=1, max_size=5, unique_by=lambda each: each[0])


@given(data=BYTES, name=st.sampled_from(["p.jsonl", "p.txt"]))
@fuzz(100)
def test_any_bytes_are_taken_whole_or_refused_whole(store: Store, tmp_path: Path, data: bytes, name: str) -> None:
    check_any_bytes(store, tmp_path / name, data)


@pytest.mark.slow
@given(data=BYTES, name=st.sampled_from(["p.jsonl", "p.txt"]))
@pytest.mark.timeout(900)
@fuzz(2_000)
def test_many_bytes_are_taken_whole_or_refused_whole(store: Store, tmp_path: Path, data: bytes, name: str) -> None:
    check_any_bytes(store, tmp_path / name, data)


@given(records=RECORDS, ascii_only=st.booleans())
@fuzz(25)
def test_texts_come_back_byte_for_byte_through_store_and_export(
    store: Store, tmp_path: Path, records: list[tuple[str, str]], ascii_only: bool
) -> None:
    check_round_trip(store, tmp_path, records, ascii_only)


@pytest.mark.slow
@given(records=RECORDS, ascii_only=st.booleans())
@pytest.mark.timeout(900)
@fuzz(500)
def test_many_texts_come_back_byte_for_byte_through_store_and_export(
    store: Store, tmp_path: Path, records: list[tuple[str, str]], ascii_only: bool
) -> None:
    check_round_trip(store, tmp_path, records, ascii_only)


# --- the command --------------------------------------------------------------------------------------------


@pytest.fixture
def environ(sqlite_url: str) -> dict[str, str]:
    return os.environ | {"BATCHMILL_DATABASE_URL": sqlite_url, "PYTHONPATH": str(ROOT / "src")}


def command(environ: dict[str, str], *words: str | Path, **more: Any) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "batchmill", *map(str, words)]
    return subprocess.run(line, capture_output=True, text=True, env=environ, timeout=60, **more)


def test_the_command_says_a_line_for_each_problem_and_exits_with_2(environ: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"prompt":"a"}\n{"prompt":"\\u0000"}\n\xff\n{"prompt":"a","custom_id":"request-0"}\n')
    done = command(environ, "submit", path, "-m", "echo")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        f"{path}:2: holds a NUL character (\\u0000)",
        f"{path}:3: not UTF-8: byte 35 is 0xff",
        f"{path}:4: duplicate custom_id 'request-0', first used at line 1",
        f"batchmill: {path}: 3 bad lines",
    ]
    assert json.loads(command(environ, "jobs", "--json").stdout) == []


def test_an_id_that_cannot_be_printed_is_told_all_the_same(environ: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"prompt":"a"}\n')
    line = [sys.executable, "-m", "batchmill", "submit", str(path), "-m", "echo"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True, env=environ, timeout=60)
    [job] = json.loads(command(environ, "jobs", "--json").stdout)
    said = f"batchmill: cannot write the id of job {job['id']} to stdout: No space left on device"
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, said)


@pytest.mark.parametrize("option", ["--name", "--system", "--stop", "--model", "--revision", "--idempotency-key"])
def test_an_option_that_is_no_text_is_refused_in_one_line(environ: dict[str, str], tmp_path: Path, option: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"prompt":"a"}\n')
    done = command(environ, "submit", path, "-m", "echo", option, os.fsdecode(b"caf\xe9"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("batchmill: --")
    assert len(done.stderr.splitlines()) == 1


#: Runs a command from a small process: the kernel counts what a process had before its exec as its own.
MEASURED = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[1:])
_, status, used = os.wait4(process.pid, 0)
print(os.waitstatus_to_exitcode(status), used.ru_maxrss, used.ru_utime + used.ru_stime, flush=True)
os._exit(0)
"""


def peak_of(environ: dict[str, str], *words: str | Path, stdin: int) -> tuple[int, int, float]:
    """Exit code, peak resident bytes and seconds of CPU of a command."""
    line = [sys.executable, "-c", MEASURED, sys.executable, "-m", "batchmill", *map(str, words)]
    done = subprocess.run(line, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environ, check=True)
    code, peak_kib, seconds = done.stdout.split()[-3:]
    return int(code), int(peak_kib) * 1024, float(seconds)


def test_an_endless_line_is_given_up_soon_and_in_flat_memory(environ: dict[str, str], tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.jsonl"
    os.mkfifo(pipe)
    block = b"x" * (1 << 20)

    def write() -> None:
        with pipe.open("wb", buffering=0) as out:
            try:
                for _ in range(10 << 10):  # ten gibibytes, were anybody to read them
                    out.write(block)
            except BrokenPipeError:
                gave_up.set()

    gave_up = threading.Event()
    writer = threading.Thread(target=write)
    writer.start()
    code, peak_bytes, seconds = peak_of(environ, "submit", pipe, "-m", "echo", stdin=subprocess.DEVNULL)
    writer.join(30)
    assert gave_up.is_set()
    with open("/dev/zero", "rb") as zeros:
        from_stdin = peak_of(environ, "submit", "-", "-m", "echo", stdin=zeros.fileno())
    assert (code, from_stdin[0]) == (2, 2)
    assert max(peak_bytes, from_stdin[1]) < MOST_BYTES
    assert max(seconds, from_stdin[2]) < 20


def test_what_is_said_of_an_endless_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts_module, "ENDLESS_BYTES", 2 << 20)
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"prompt":"fine"}\nbad\n' + bytes(4 << 20) + b"\nbad\n")
    with PromptFile(str(path), max_line_bytes=1 << 20) as prompts:
        assert [line.number for line in prompts] == [1]
        with pytest.raises(PromptFileError, match="2 bad lines; reading stopped 2 MiB into the last one") as said:
            prompts.raise_if_bad()
    assert (
        said.value.problems[1] == f"{path}:3: longer than 1048576 bytes; raise the setting max_line_bytes to allow it"
    )


@pytest.mark.parametrize("what", ["missing", "folder", "/dev/zero", "loop", "socket", "unreadable"])
def test_what_is_no_file_is_refused_at_once(environ: dict[str, str], tmp_path: Path, what: str) -> None:
    path = tmp_path / what
    if what == "folder":
        path.mkdir()
    elif what == "loop":
        path.symlink_to(path)
    elif what == "unreadable":
        path = Path("/proc/self/mem")  # opens for everybody, and cannot be read at its beginning by anybody
    elif what == "socket":
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(what)  # in the current folder, since the path of a socket is short
    # `--once` and `run` read a file for its hash first, and neither may trip over it there.
    for words in (["submit", "--once"], ["run"])[: 2 if what == "unreadable" else 1]:
        own = {**environ, "BATCHMILL_DATABASE_URL": ""} if words == ["run"] else environ
        done = command(own, *words, "/dev/zero" if what == "/dev/zero" else path, "-m", "echo")
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert done.stderr.startswith("batchmill: ")


def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"prompt":"a"}\n')
    path.chmod(0)
    who = os.geteuid()
    if who == 0:
        os.seteuid(65534)  # root reads everything
    try:
        with pytest.raises(PromptFileError, match="cannot be read: Permission denied"):
            PromptFile(str(path))
        assert Submission(str(path), "echo").fingerprint_of_file(mill.ECHO_SPEC) is None
    finally:
        os.seteuid(who)
