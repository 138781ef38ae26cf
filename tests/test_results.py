"""What an export writes: JSONL, the OpenAI Batch format, CSV, and files that are replaced whole."""

from __future__ import annotations

import csv
import io
import json
import stat
from pathlib import Path

import pytest

from jobs.errors import BatchmillError
from jobs.schema import Choice, ErrorCode, Output, Request, RequestKey
from jobs.store import Store
from jobs.store.lease import Held
from jobs.store.reading import Job
from producer.results import CSV_COLUMNS, errors_path, export, replaced
from tests import mill

PASSED = {"user": "u", "metadata": {"a": "b"}}
REQUESTS = [
    Request(0, "chat", messages=({"role": "user", "content": "hi"},), passthrough=PASSED),
    Request(1, "plain", prompt='it says "messages": here'),
    Request(2, "too long", prompt="x"),
    Request(3, "no memory", prompt="x"),
    Request(4, "left", prompt="x"),
]


@pytest.fixture
def store(sqlite_url: str) -> Store:
    return Store(sqlite_url)


@pytest.fixture
def job(store: Store) -> Job:
    """A cancelled job with an output of every kind."""
    job_id = mill.begin(store, batch_size=4)
    store.loading.add(job_id, prompts=REQUESTS, batch_size=4, lease_seconds=60)
    store.loading.open(job_id, spec=mill.ECHO_SPEC, file_sha256="", fingerprint="", lease_seconds=60)
    who = mill.seat(store)
    (claimed,) = mill.claim(store, who)
    outputs = [
        Output(RequestKey(job_id, 0), (Choice("hello\u2028ü", "stop"),), 3, 4),
        Output(RequestKey(job_id, 1), (Choice('a,"b"\nc', "length"),), 5, 6),
        Output.failed(RequestKey(job_id, 2), ErrorCode.CONTEXT_LENGTH_EXCEEDED, "too long", prompt_tokens=9),
        Output.failed(RequestKey(job_id, 3), ErrorCode.OUT_OF_MEMORY, "no memory"),
    ]
    mill.save(store, who, [Held(claimed.lease, outputs=outputs)])
    store.closing.cancel(job_id)
    return store.reading.job(job_id)


def test_jsonl_has_the_documented_keys_and_what_was_passed_through(store: Store, job: Job, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    assert export(store, job, out=out, form="jsonl", only="all") == 5
    lines = [json.loads(line) for line in out.read_bytes().split(b"\n")[:-1]]
    assert lines[0] == {
        "index": 0,
        "custom_id": "chat",
        "text": "hello\u2028ü",
        "finish_reason": "stop",
        "prompt_tokens": 3,
        "completion_tokens": 4,
        "error": None,
        "user": "u",
        "metadata": {"a": "b"},
    }
    assert lines[2] == {
        "index": 2,
        "custom_id": "too long",
        "text": None,
        "finish_reason": None,
        "prompt_tokens": 9,
        "completion_tokens": 0,
        "error": {"code": "context_length_exceeded", "message": "too long"},
    }
    assert lines[4]["error"]["code"] == "cancelled"


@pytest.mark.parametrize(("only", "indexes"), [("all", [0, 1, 2, 3, 4]), ("succeeded", [0, 1]), ("failed", [2, 3, 4])])
def test_only_some_outputs_on_request(
    store: Store, job: Job, only: str, indexes: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    export(store, job, out=None, form="jsonl", only=only)
    assert [json.loads(line)["index"] for line in capsys.readouterr().out.split("\n")[:-1]] == indexes


def test_the_openai_format_line_by_line(store: Store, job: Job, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    export(store, job, out=out, form="openai", only="all")
    good = [json.loads(line) for line in out.read_bytes().split(b"\n")[:-1]]
    bad = [json.loads(line) for line in errors_path(out).read_bytes().split(b"\n")[:-1]]
    assert errors_path(out).name == "answers.errors.jsonl"
    chat, plain = good
    body = chat["response"].pop("body")
    assert chat == {
        "id": chat["id"],
        "custom_id": "chat",
        "response": {"status_code": 200, "request_id": chat["response"]["request_id"]},
        "error": None,
    }
    assert chat["id"].startswith("batch_req_")
    assert isinstance(body.pop("created"), int)
    assert body.pop("id").startswith("chatcmpl-")
    assert body == {
        "object": "chat.completion",
        "model": "echo",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "hello\u2028ü", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7},
        "system_fingerprint": None,
        "user": "u",
        "metadata": {"a": "b"},
    }
    assert plain["response"]["body"]["object"] == "text_completion"
    assert plain["response"]["body"]["choices"][0]["text"] == 'a,"b"\nc'
    refused, failed, cancelled = bad
    assert refused["error"] is None
    assert refused["response"]["status_code"] == 400
    assert refused["response"]["body"]["error"] == {
        "message": "too long",
        "type": "invalid_request_error",
        "param": None,
        "code": "context_length_exceeded",
    }
    assert failed["response"]["status_code"] == 500
    assert cancelled["response"] is None
    assert cancelled["error"]["code"] == "batch_cancelled"
    ids = [line["id"] for line in good + bad]
    assert len(set(ids)) == 5


def test_two_openai_exports_are_byte_for_byte_equal(store: Store, job: Job, tmp_path: Path) -> None:
    one, other = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
    for out in (one, other):
        export(store, job, out=out, form="openai", only="all")
    assert one.read_bytes() == other.read_bytes()
    assert errors_path(one).read_bytes() == errors_path(other).read_bytes()


def test_csv_quotes_what_needs_it(store: Store, job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    export(store, job, out=None, form="csv", only="all")
    header, *rows = csv.reader(io.StringIO(capsys.readouterr().out))
    assert tuple(header) == CSV_COLUMNS
    assert rows[1][:4] == ["1", "plain", 'a,"b"\nc', "length"]
    assert dict(zip(header, rows[0], strict=True))["metadata"] == '{"a":"b"}'
    assert rows[2][6:8] == ["context_length_exceeded", "too long"]


def test_a_failed_export_leaves_the_old_file(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("old")
    with pytest.raises(UnicodeEncodeError), replaced(out) as file:
        file.write("half of the new one, then what cannot be written: \ud800")
    assert out.read_text() == "old"
    assert list(tmp_path.iterdir()) == [out]


def test_a_replaced_file_keeps_its_mode_and_a_new_one_is_readable(tmp_path: Path) -> None:
    kept, new = tmp_path / "kept", tmp_path / "new"
    kept.touch(mode=0o640)
    kept.chmod(0o640)
    for out in (kept, new):
        with replaced(out) as file:
            file.write("x")
    assert stat.S_IMODE(kept.stat().st_mode) == 0o640
    assert stat.S_IMODE(new.stat().st_mode) & 0o044


def test_a_folder_that_is_not_there_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(BatchmillError, match="cannot write"), replaced(tmp_path / "none" / "out"):
        pass
