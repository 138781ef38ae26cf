"""Exports in the OpenAI Batch format: answers, errors and their status codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from batchmill.jobs.requests.request import ErrorCode
from batchmill.jobs.requests.states import RequestState
from batchmill.jobs.store.store import Store
from batchmill.jobs.store.views.jobs import Job, OutputRow
from batchmill.producer.cli.jobs import results
from batchmill.producer.files.export import errors_path, export
from batchmill.producer.requests.result_lines import openai_line
from tests.support.logprobs import LOGPROBS


@pytest.mark.parametrize("code", [each for each in ErrorCode if each is not ErrorCode.CANCELLED])
def test_what_a_user_can_mend_has_status_400_in_the_openai_format(store: Store, job: Job, code: ErrorCode) -> None:
    ours = code in (ErrorCode.OUT_OF_MEMORY, ErrorCode.NOT_A_NUMBER, ErrorCode.ENGINE_ERROR)
    row = OutputRow(0, "a", "{}", RequestState.FAILED, "[]", 0, 0, code, "why", 0.0, None, None, None)
    response = openai_line(row, job)["response"]
    kind = "server_error" if ours else "invalid_request_error"
    assert (response["status_code"], response["body"]["error"]["type"]) == (500 if ours else 400, kind)


@pytest.mark.parametrize(
    ("only", "said"),
    [
        ("all", "wrote 2 of 5 outputs to a.jsonl, 3 to a.errors.jsonl"),
        ("failed", "wrote 0 of 5 outputs to a.jsonl, 3 to a.errors.jsonl"),
        ("succeeded", "wrote 2 of 5 outputs to a.jsonl; a.errors.jsonl is empty: none of them failed"),
    ],
)
def test_what_went_to_which_file_is_said(
    sqlite_url: str, job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, only: str, said: str
) -> None:
    monkeypatch.setenv("BATCHMILL_DATABASE_URL", sqlite_url)
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(results, [job.id, "--format", "openai", "-o", "a.jsonl", "--only", only])
    assert done.stderr == f"{said}\n"
    assert bool(Path("a.errors.jsonl").read_bytes()) == (only != "succeeded")
    done = CliRunner().invoke(results, [job.id, "-o", "b.jsonl"])
    assert done.stderr == "wrote 5 of 5 outputs to b.jsonl\n"


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


def test_the_openai_format_has_every_choice_with_the_logprobs_of_its_endpoint(
    store: Store, rich: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    export(store, rich, out=None, form="openai", only="all")
    chat, plain = [json.loads(line)["response"]["body"] for line in capsys.readouterr().out.split("\n")[:-1]]
    assert chat["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "hey", "refusal": None},
            "logprobs": LOGPROBS | {"refusal": None},
            "finish_reason": "stop",
        },
        {
            "index": 1,
            "message": {"role": "assistant", "content": "ho", "refusal": None},
            "logprobs": {"content": [], "refusal": None},
            "finish_reason": "length",
        },
    ]
    first, second = plain["choices"]
    assert first["text"] == "hey"
    assert first["logprobs"] == {
        "text_offset": [0, 2],
        "token_logprobs": [-0.1, -0.5],
        "tokens": ["he", "y"],
        "top_logprobs": [{"he": -0.1, "ho": -2.5}, {"y": -0.5}],
    }
    assert second["logprobs"] == {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
