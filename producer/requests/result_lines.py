"""One output of the store -> one line of an export: batchmill's own, the OpenAI Batch API's, or a row of CSV.

It owns the public keys that all kinds share, which never change their meaning; a kind's own are in its Forms. It knows
neither files nor pages.
"""

from __future__ import annotations

import json
from typing import Any

from batchmill.jobs.requests.request import ErrorCode
from batchmill.jobs.store.views.jobs import Job, OutputRow
from batchmill.producer.requests.forms import KEPT, Parts, adapter_of, response_id
from batchmill.producer.requests.kinds import forms_of

TIMINGS = ("queued_seconds", "prefill_seconds", "decode_seconds")
to_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def jsonl_line(row: OutputRow, job: Job) -> dict[str, Any]:
    """One output as batchmill writes it; what the request passed through follows under its own keys.

    A generation's `text`, `finish_reason`, `logprobs` and `tool_calls` are those of the first choice. `logprobs`,
    `choices`, `adapter` and `timings` are there only where logprobs, several choices or an adapter were asked for, and
    where the engine took the times; `tool_calls` where the text holds some.
    """
    answer = forms_of(job.kind).answer(_parts(row))
    line: dict[str, Any] = {
        "index": row.index,
        "custom_id": row.custom_id,
        **answer.always,
        "prompt_tokens": row.prompt_tokens,
        "completion_tokens": row.completion_tokens,
        "error": None if row.error_code is None else {"code": row.error_code, "message": row.error_message},
        **answer.some,
    }
    if (adapter := adapter_of(row)) is not None:
        line["adapter"] = adapter
    if row.queued_seconds is not None:
        line["timings"] = {name: getattr(row, name) for name in TIMINGS}
    return line | _passthrough(row)


def csv_columns(kind: str) -> tuple[str, ...]:
    """The names of the values of `csv_row` for a job of this kind."""
    own = forms_of(kind).columns
    counts = ("prompt_tokens", "completion_tokens", "error_code", "error_message")
    return ("index", "custom_id", *own, *counts, *KEPT)


def csv_row(row: OutputRow, job: Job) -> tuple[Any, ...]:
    """The values of `csv_columns`; of several choices the first; passed through objects are JSON text."""
    forms, passed = forms_of(job.kind), _passthrough(row)
    always = forms.answer(_parts(row)).always
    return (
        row.index,
        row.custom_id,
        *(always[name] for name in forms.columns),
        row.prompt_tokens,
        row.completion_tokens,
        row.error_code,
        row.error_message,
        *(value if isinstance(value := passed.get(name), str | None) else to_json(value) for name in KEPT),
    )


def openai_line(row: OutputRow, job: Job) -> dict[str, Any]:
    """One line of the OpenAI Batch API; its ids follow from job and index, so that two exports are equal."""
    response = None
    error = None
    if row.error_code is None:
        body = forms_of(job.kind).response(row, job, _parts(row)) | _passthrough(row)
        response = {"status_code": 200, "request_id": response_id("req_", job, row), "body": body}
    elif row.error_code == ErrorCode.CANCELLED:
        error = {"code": "batch_cancelled", "message": row.error_message}
    else:
        status_code = 500 if row.error_code in _OUR_FAULT else 400
        request_id = response_id("req_", job, row)
        response = {"status_code": status_code, "request_id": request_id, "body": {"error": _api_error(row)}}
    line_id = response_id("batch_req_", job, row)
    return {"id": line_id, "custom_id": row.custom_id, "response": response, "error": error}


def _api_error(row: OutputRow) -> dict[str, Any]:
    kind = "server_error" if row.error_code in _OUR_FAULT else "invalid_request_error"
    return {"message": row.error_message, "type": kind, "param": None, "code": row.error_code}


_OUR_FAULT = frozenset({ErrorCode.OUT_OF_MEMORY.value, ErrorCode.NOT_A_NUMBER.value, ErrorCode.ENGINE_ERROR.value})


def _parts(row: OutputRow) -> Parts:
    """The parts that the store keeps; logprobs that are no numbers, which old stores hold, become null."""
    kept: Parts = json.loads(row.payload, parse_constant=lambda _: None)
    return kept


def _passthrough(row: OutputRow) -> dict[str, Any]:
    if '"passthrough":' not in row.body:
        return {}
    passed: dict[str, Any] = json.loads(row.body).get("passthrough", {})
    return passed
