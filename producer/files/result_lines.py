"""One output of the store -> one line of an export: batchmill's own, the OpenAI Batch API's, or a row of CSV.

It owns the public keys, which never change their meaning. It knows neither files nor pages.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from batchmill.jobs.requests.generation import ErrorCode
from batchmill.jobs.store.views.jobs import Job, OutputRow

PASSTHROUGH = ("user", "metadata", "store", "service_tier")
TIMINGS = ("queued_seconds", "prefill_seconds", "decode_seconds")
CSV_COLUMNS = (
    "index",
    "custom_id",
    "text",
    "finish_reason",
    "prompt_tokens",
    "completion_tokens",
    "error_code",
    "error_message",
    *PASSTHROUGH,
)
to_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def jsonl_line(row: OutputRow) -> dict[str, Any]:
    """One output as batchmill writes it; what the request passed through follows under its own keys.

    `text`, `finish_reason`, `logprobs` and `tool_calls` are those of the first choice. `logprobs`, `choices`, `adapter`
    and `timings` are there only where logprobs, several choices or an adapter were asked for, and where the engine took
    the times; `tool_calls` where the text holds some.
    """
    choices = _choices(row)
    first = choices[0] if choices else {}
    line: dict[str, Any] = {
        "index": row.index,
        "custom_id": row.custom_id,
        "text": first.get("text"),
        "finish_reason": first.get("finish_reason"),
        "prompt_tokens": row.prompt_tokens,
        "completion_tokens": row.completion_tokens,
        "error": None if row.error_code is None else {"code": row.error_code, "message": row.error_message},
    }
    if "logprobs" in first:
        line["logprobs"] = first["logprobs"]
    if "tool_calls" in first:
        line["tool_calls"] = first["tool_calls"]
    if len(choices) > 1:
        line["choices"] = [{key: each[key] for key in each if key != "content"} for each in choices]
    if (adapter := adapter_of(row)) is not None:
        line["adapter"] = adapter
    if row.queued_seconds is not None:
        line["timings"] = {name: getattr(row, name) for name in TIMINGS}
    return line | _passthrough(row)


def csv_row(row: OutputRow) -> tuple[Any, ...]:
    """The values of CSV_COLUMNS, of the first choice; passed through objects are JSON text."""
    choices, passed = _choices(row), _passthrough(row)
    first = choices[0] if choices else {}
    return (
        row.index,
        row.custom_id,
        first.get("text"),
        first.get("finish_reason"),
        row.prompt_tokens,
        row.completion_tokens,
        row.error_code,
        row.error_message,
        *(value if isinstance(value := passed.get(name), str | None) else to_json(value) for name in PASSTHROUGH),
    )


def openai_line(row: OutputRow, job: Job) -> dict[str, Any]:
    """One line of the OpenAI Batch API; its ids follow from job and index, so that two exports are equal."""
    response = None
    error = None
    if row.error_code is None:
        response = {"status_code": 200, "request_id": _id("req_", job, row), "body": _completion(row, job)}
    elif row.error_code == ErrorCode.CANCELLED:
        error = {"code": "batch_cancelled", "message": row.error_message}
    else:
        status_code = 500 if row.error_code in _OUR_FAULT else 400
        response = {"status_code": status_code, "request_id": _id("req_", job, row), "body": {"error": _api_error(row)}}
    return {"id": _id("batch_req_", job, row), "custom_id": row.custom_id, "response": response, "error": error}


def _completion(row: OutputRow, job: Job) -> dict[str, Any]:
    chat = '"messages":' in row.body and "messages" in json.loads(row.body)
    body: dict[str, Any] = {
        "id": _id("chatcmpl-" if chat else "cmpl-", job, row),
        "object": "chat.completion" if chat else "text_completion",
        "created": int(row.finished_at),
        "model": adapter_of(row) or job.spec.model,
        "choices": [_choice(place, each, chat) for place, each in enumerate(_choices(row))],
        "usage": {
            "prompt_tokens": row.prompt_tokens,
            "completion_tokens": row.completion_tokens,
            "total_tokens": row.prompt_tokens + row.completion_tokens,
        },
        "system_fingerprint": None,
    }
    return body | _passthrough(row)


def _choice(place: int, choice: Mapping[str, Any], chat: bool) -> dict[str, Any]:
    text = choice["text"]
    said: dict[str, Any] = {"text": text}
    reason = choice["finish_reason"]
    if chat:
        said = {"message": {"role": "assistant", "content": text, "refusal": None}}
    if chat and "tool_calls" in choice:
        said["message"] |= {"content": choice["content"], "tool_calls": choice["tool_calls"]}
        reason = "tool_calls" if reason == "stop" else reason
    logprobs = choice.get("logprobs")
    if logprobs is not None:
        logprobs = {**logprobs, "refusal": None} if chat else _completion_logprobs(logprobs["content"])
    return {"index": place, **said, "logprobs": logprobs, "finish_reason": reason}


def _completion_logprobs(content: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The form that /v1/completions has for them; offsets count the characters of the tokens before."""
    tokens = [each["token"] for each in content]
    return {
        "text_offset": list(accumulate(map(len, tokens[:-1]), initial=0)) if tokens else [],
        "token_logprobs": [each["logprob"] for each in content],
        "tokens": tokens,
        "top_logprobs": [{top["token"]: top["logprob"] for top in (*each["top_logprobs"], each)} for each in content],
    }


def _api_error(row: OutputRow) -> dict[str, Any]:
    kind = "server_error" if row.error_code in _OUR_FAULT else "invalid_request_error"
    return {"message": row.error_message, "type": kind, "param": None, "code": row.error_code}


_OUR_FAULT = frozenset({ErrorCode.OUT_OF_MEMORY.value, ErrorCode.NOT_A_NUMBER.value, ErrorCode.ENGINE_ERROR.value})


def adapter_of(row: OutputRow) -> str | None:
    """The adapter that the request named."""
    if '"adapter":' not in row.body:
        return None
    named: str | None = json.loads(row.body).get("adapter")
    return named


def _choices(row: OutputRow) -> list[dict[str, Any]]:
    """What the store keeps of them; logprobs that are no numbers, which it once took, become null."""
    kept: list[dict[str, Any]] = json.loads(row.choices, parse_constant=lambda _: None)
    return kept


def _id(prefix: str, job: Job, row: OutputRow) -> str:
    return prefix + hashlib.sha256(f"{prefix}{job.id}/{row.index}".encode()).hexdigest()[:24]


def _passthrough(row: OutputRow) -> dict[str, Any]:
    if '"passthrough":' not in row.body:
        return {}
    passed: dict[str, Any] = json.loads(row.body).get("passthrough", {})
    return passed
