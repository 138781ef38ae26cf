"""Any answer comes back from each form of an export as the engine gave it, on both databases."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchmill.jobs.requests.generation import Choice, GenerationRequest
from batchmill.jobs.requests.request import ErrorCode, Output, RequestKey
from batchmill.jobs.requests.states import RequestState
from batchmill.jobs.store.leases.lease import BatchReport
from batchmill.jobs.store.store import Store
from batchmill.producer.files.export import errors_path, export
from batchmill.producer.requests.forms import KEPT
from batchmill.producer.requests.result_lines import csv_columns
from tests.support.store import mill

AWKWARD = "\0\r\n\t\x0b\x1c\x85\u2028\u2029\ufeff\ufffe\U0001f600\"',;= \\a"
TEXT = st.text(AWKWARD, max_size=8) | st.text(max_size=20)
NAME = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1, max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=4,
)
NUMBER = st.floats(max_value=0, allow_nan=False, allow_infinity=False)
BYTES = st.lists(st.integers(0, 255), max_size=4)
TOP = st.fixed_dictionaries({"token": TEXT, "logprob": NUMBER, "bytes": BYTES})
TOKEN = st.fixed_dictionaries(
    {"token": TEXT, "logprob": NUMBER, "bytes": BYTES, "top_logprobs": st.lists(TOP, max_size=2)}
)
CALL = st.fixed_dictionaries(
    {
        "id": NAME,
        "type": st.just("function"),
        "function": st.fixed_dictionaries({"name": NAME, "arguments": JSON.map(json.dumps)}),
    }
)


@st.composite
def choices(draw: st.DrawFn) -> Choice:
    logprobs = draw(st.none() | st.fixed_dictionaries({"content": st.lists(TOKEN, max_size=3)}))
    calls = draw(st.none() | st.lists(CALL, min_size=1, max_size=2))
    content = None if calls is None else draw(st.none() | TEXT)
    return Choice(draw(TEXT), draw(st.sampled_from(["stop", "length"])), logprobs, calls, content)


@st.composite
def answered(draw: st.DrawFn) -> tuple[GenerationRequest, Output]:
    """A request with its output; the index is 0."""
    passed = st.fixed_dictionaries(
        {},
        optional={"user": TEXT, "metadata": st.dictionaries(TEXT, JSON), "store": st.booleans(), "service_tier": TEXT},
    )
    asked: dict[str, Any] = draw(
        st.sampled_from([{"prompt": "x"}, {"prompt": '"messages":'}, {"messages": ({"role": "user", "content": "x"},)}])
    )
    request = GenerationRequest(0, draw(NAME), passthrough=draw(passed) or None, **asked)
    key = RequestKey("", 0)
    if draw(st.booleans()):
        code = draw(st.sampled_from([each for each in ErrorCode if each is not ErrorCode.CANCELLED]))
        return request, Output.failed(key, code, draw(TEXT | st.text("\0\ud800", min_size=1)), prompt_tokens=3)
    said = draw(st.lists(choices(), min_size=1, max_size=3))
    return request, Output(key, tuple(said), prompt_tokens=3, completion_tokens=4)


def test_a_message_of_what_no_database_can_hold_is_told_with_marks(store: Store) -> None:
    """A template's own words, say, are anybody's; on PostgreSQL they were a turn that could not be saved."""
    job_id = mill.load(store, 1)
    who = mill.session(store)
    (claimed,) = mill.claim(store, who)
    refused = Output.failed(RequestKey(job_id, 0), ErrorCode.CHAT_TEMPLATE_ERROR, "no\0 such \ud800role")
    mill.save(store, who, [BatchReport(claimed.lease, outputs=[refused])])
    ((row,),) = store.jobs.output_pages(job_id, states=frozenset(RequestState), page=9)
    assert row.error_message == "no\ufffd such \ufffdrole"


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(answered(), min_size=1, max_size=4))
def test_every_form_of_an_export_has_every_answer_whole(
    store: Store, tmp_path: Path, pairs: list[tuple[GenerationRequest, Output]]
) -> None:
    requests = [replace(one, index=index, custom_id=f"{index}{one.custom_id}") for index, (one, _) in enumerate(pairs)]
    job_id = mill.begin(store)
    store.creation.add(job_id, prompts=requests, batch_size=4, lease_seconds=60)
    store.creation.open(job_id, spec=mill.ECHO_SPEC, file_sha256="", fingerprint="", lease_seconds=60)
    outputs = [replace(output, key=RequestKey(job_id, index)) for index, (_, output) in enumerate(pairs)]
    who = mill.session(store)
    (claimed,) = mill.claim(store, who)
    mill.save(store, who, [BatchReport(claimed.lease, outputs=outputs)])
    job = store.jobs.job(job_id)
    for form in ("jsonl", "openai", "csv"):
        assert export(store, job, out=tmp_path / form, form=form, only="all").count == len(pairs)
    jsonl, good, bad = lines(tmp_path / "jsonl"), lines(tmp_path / "openai"), lines(errors_path(tmp_path / "openai"))
    with (tmp_path / "csv").open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file, strict=True)
    assert tuple(header) == csv_columns("generation")
    by_id = {line["custom_id"]: line for line in good + bad}
    assert len(jsonl) == len(rows) == len(by_id) == len(good + bad) == len(pairs)
    for request, output, line, row in zip(requests, outputs, jsonl, rows, strict=True):
        check_jsonl(request, output, line)
        check_csv(request, output, dict(zip(header, row, strict=True)))
        check_openai(request, output, by_id[request.custom_id])


def lines(path: Path) -> list[dict[str, Any]]:
    """Strict JSON, a line for each "\\n" and for nothing else."""
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_bytes().decode().split("\n")[:-1]]


def check_jsonl(request: GenerationRequest, output: Output, line: dict[str, Any]) -> None:
    first = output.payload[0] if output.payload else None
    assert (line["index"], line["custom_id"]) == (request.index, request.custom_id)
    assert line["error"] == (output.error and {"code": output.error.code, "message": output.error.message})
    assert (line["text"], line["finish_reason"]) == ((first.text, first.finish_reason) if first else (None, None))
    for name in ("logprobs", "tool_calls"):
        assert line.get(name) == (first and getattr(first, name))
    told = [(each["text"], each.get("logprobs"), each.get("tool_calls")) for each in line.get("choices", [])]
    more = output.payload if len(output.payload) > 1 else ()
    assert told == [(each.text, each.logprobs, each.tool_calls) for each in more]
    assert {name: line[name] for name in KEPT if name in line} == (request.passthrough or {})


def check_csv(request: GenerationRequest, output: Output, row: dict[str, str]) -> None:
    first, error, passed = (output.payload or [None])[0], output.error, request.passthrough or {}
    assert (row["index"], row["custom_id"]) == (str(request.index), request.custom_id)
    assert (row["text"], row["finish_reason"]) == ((first.text, first.finish_reason) if first else ("", ""))
    assert (row["error_code"], row["error_message"]) == ((error.code, error.message) if error else ("", ""))
    assert (row["prompt_tokens"], row["completion_tokens"]) == ("3", str(output.completion_tokens))
    for name in ("user", "service_tier"):
        assert row[name] == passed.get(name, "")
    for name in ("metadata", "store"):
        assert (json.loads(row[name]) if row[name] else None) == passed.get(name)


def check_openai(request: GenerationRequest, output: Output, line: dict[str, Any]) -> None:
    body = line["response"]["body"]
    if output.error is not None:
        assert (body["error"]["code"], body["error"]["message"]) == (output.error.code, output.error.message)
        return
    assert {name: body[name] for name in KEPT if name in body} == (request.passthrough or {})
    assert len(body["choices"]) == len(output.payload)
    for said, choice in zip(body["choices"], output.payload, strict=True):
        if request.messages is None:
            assert said["text"] == choice.text
            tokens = [each["token"] for each in choice.logprobs["content"]] if choice.logprobs else []
            assert (said["logprobs"] or {"tokens": []})["tokens"] == tokens
            continue
        message = said["message"]
        assert message["content"] == (choice.text if choice.tool_calls is None else choice.content)
        assert message.get("tool_calls") == choice.tool_calls
        assert said["logprobs"] == (choice.logprobs and {**choice.logprobs, "refusal": None})
        assert said["finish_reason"] == (
            "tool_calls" if choice.tool_calls and choice.finish_reason == "stop" else choice.finish_reason
        )
