"""Exports as JSONL and CSV: their keys and columns, from outputs of every state."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from sqlalchemy import update

from batchmill.jobs.models.adapters import Adapter
from batchmill.jobs.store import tables
from batchmill.jobs.store.store import Store
from batchmill.jobs.store.views.jobs import Job
from batchmill.producer.files.export import export
from batchmill.producer.requests.result_lines import csv_columns
from tests.support.logprobs import LOGPROBS
from tests.support.store import mill


def test_jsonl_has_the_documented_keys_and_what_was_passed_through(store: Store, job: Job, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    assert export(store, job, out=out, form="jsonl", only="all").count == 5
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


@pytest.mark.parametrize("form", ["jsonl", "openai", "csv"])
def test_what_was_once_stored_as_no_number_is_exported_as_strict_json(
    store: Store, job: Job, tmp_path: Path, form: str
) -> None:
    kept = (
        '[{"text":"x","finish_reason":"stop","logprobs":{"content":[{"token":"x","logprob":NaN,"top_logprobs":[]}]}}]'
    )
    with store.database.write() as connection:
        connection.execute(update(tables.outputs).where(tables.outputs.c.state == "succeeded").values(payload=kept))
    out = tmp_path / f"out.{form}"
    export(store, job, out=out, form=form, only="succeeded")
    text = out.read_text()
    assert "NaN" not in text
    if form != "csv":
        lines = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
        assert len(lines) == 2
        assert '"logprob": null' in json.dumps(lines[0])


@pytest.mark.parametrize(("only", "indexes"), [("all", [0, 1, 2, 3, 4]), ("succeeded", [0, 1]), ("failed", [2, 3, 4])])
def test_only_some_outputs_on_request(
    store: Store, job: Job, only: str, indexes: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    export(store, job, out=None, form="jsonl", only=only)
    assert [json.loads(line)["index"] for line in capsys.readouterr().out.split("\n")[:-1]] == indexes


def test_answers_of_an_adapter_name_it(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    job_id = mill.load_named(store, "sql", None)
    mill.work_off(store, mill.session(store, adapters=[Adapter("sql", "/a")]))
    lines = {}
    for form in ("jsonl", "openai"):
        export(store, store.jobs.job(job_id), out=None, form=form, only="all")
        lines[form] = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line.get("adapter", "none") for line in lines["jsonl"]] == ["sql", "none"]
    assert [line["response"]["body"]["model"] for line in lines["openai"]] == ["sql", "echo"]


def test_csv_quotes_what_needs_it(store: Store, job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    export(store, job, out=None, form="csv", only="all")
    header, *rows = csv.reader(io.StringIO(capsys.readouterr().out))
    assert tuple(header) == csv_columns("generation")
    assert rows[1][:4] == ["1", "plain", 'a,"b"\nc', "length"]
    assert dict(zip(header, rows[0], strict=True))["metadata"] == '{"a":"b"}'
    assert rows[2][6:8] == ["context_length_exceeded", "too long"]


def test_jsonl_has_choices_logprobs_and_timings_where_there_are_some(
    store: Store, rich: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    export(store, rich, out=None, form="jsonl", only="all")
    first = json.loads(capsys.readouterr().out.split("\n")[0])
    assert first == {
        "index": 0,
        "custom_id": "chat",
        "text": "hey",
        "finish_reason": "stop",
        "prompt_tokens": 3,
        "completion_tokens": 5,
        "error": None,
        "logprobs": LOGPROBS,
        "choices": [
            {"text": "hey", "finish_reason": "stop", "logprobs": LOGPROBS},
            {"text": "ho", "finish_reason": "length", "logprobs": {"content": []}},
        ],
        "timings": {"queued_seconds": 0.25, "prefill_seconds": 0.5, "decode_seconds": 1.0},
        "user": "u",
        "metadata": {"a": "b"},
    }


def test_csv_keeps_its_columns_and_has_the_first_choice(
    store: Store, rich: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    export(store, rich, out=None, form="csv", only="all")
    header, first, _ = csv.reader(io.StringIO(capsys.readouterr().out))
    assert tuple(header) == csv_columns("generation")
    assert first[:4] == ["0", "chat", "hey", "stop"]


def test_an_output_without_anything_new_has_the_bytes_it_always_had(
    store: Store, job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    export(store, job, out=None, form="jsonl", only="succeeded")
    assert capsys.readouterr().out.split("\n")[1] == (
        '{"index":1,"custom_id":"plain","text":"a,\\"b\\"\\nc","finish_reason":"length","prompt_tokens":5,'
        '"completion_tokens":6,"error":null}'
    )
