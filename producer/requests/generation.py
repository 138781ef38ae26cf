"""Generation, the kind that is answered with text, as its users write and read it: prompts, chats and completions.

It owns the forms of its lines and result lines, whose public keys never change their meaning. It knows neither the
options of the sampler (`options` does) nor the form of a message (`messages`), nor what lines of all kinds share
(`lines` and `result_lines`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import accumulate
from typing import Any

from batchmill.jobs.requests.generation import NO_SAMPLING, GenerationRequest, SamplingParams
from batchmill.jobs.store.views.jobs import Job, OutputRow
from batchmill.producer.requests.checks import BOOLEAN, OBJECT, STRING, BadLine, Check, only, refused
from batchmill.producer.requests.forms import (
    SHARED,
    AnswerKeys,
    Forms,
    LineForm,
    Parts,
    adapter_of,
    response_id,
    take_kept,
)
from batchmill.producer.requests.messages import messages
from batchmill.producer.requests.options import CHAT_SAMPLING, PROMPT_SAMPLING, sampling_of
from batchmill.producer.requests.tools import tool_choice, tools


def text_request(line: str, index: int) -> GenerationRequest:
    """The request of one line of plain text; BadLine if no database can hold it."""
    if "\0" in line:
        raise BadLine("holds a NUL character")
    return GenerationRequest(index, f"request-{index}", line)


def _request(taken: dict[str, Any], index: int, custom_id: str, adapter: str | None) -> GenerationRequest:
    prompt, chat = taken.pop("prompt", None), taken.pop("messages", None)
    template = taken.pop("chat_template_kwargs", None) or None
    if not taken:
        return GenerationRequest(index, custom_id, prompt, chat, NO_SAMPLING, template, None, adapter)
    declared, calls_tools = _tools(taken)
    kept = take_kept(taken)
    sampling = sampling_of(taken)
    return GenerationRequest(index, custom_id, prompt, chat, sampling, template, kept, adapter, declared, calls_tools)


def _tools(taken: dict[str, Any]) -> tuple[tuple[dict[str, Any], ...] | None, bool]:
    """The tools that a line names, and whether its answer may call them."""
    declared, choice, parallel = (taken.pop(key, None) for key in _TOOLS)
    if declared and parallel is False:
        raise BadLine("is not supported as false beside tools, since calls cannot be limited", "parallel_tool_calls")
    return declared, not declared or choice != "none"


def _completion_prompt(value: Any) -> Any:
    if type(value) is not list:
        return STRING(value)
    if len(value) == 1 and type(value[0]) is str:
        return value[0]
    raise BadLine("must be one string: tokens are not supported, and each prompt has a line of its own")


def _answer(parts: Parts) -> AnswerKeys:
    """The keys of the first choice, and `choices` where there are several."""
    first = parts[0] if parts else {}
    some: dict[str, Any] = {key: first[key] for key in ("logprobs", "tool_calls") if key in first}
    if len(parts) > 1:
        some["choices"] = [{key: each[key] for key in each if key != "content"} for each in parts]
    return AnswerKeys({"text": first.get("text"), "finish_reason": first.get("finish_reason")}, some)


def _response(row: OutputRow, job: Job, parts: Parts) -> dict[str, Any]:
    chat = '"messages":' in row.body and "messages" in json.loads(row.body)
    return {
        "id": response_id("chatcmpl-" if chat else "cmpl-", job, row),
        "object": "chat.completion" if chat else "text_completion",
        "created": int(row.finished_at),
        "model": adapter_of(row) or job.spec.model,
        "choices": [_choice(place, each, chat) for place, each in enumerate(parts)],
        "usage": {
            "prompt_tokens": row.prompt_tokens,
            "completion_tokens": row.completion_tokens,
            "total_tokens": row.prompt_tokens + row.completion_tokens,
        },
        "system_fingerprint": None,
    }


def _choice(place: int, choice: Mapping[str, Any], chat: bool) -> dict[str, Any]:
    text = choice["text"]
    answer: dict[str, Any] = {"text": text}
    reason = choice["finish_reason"]
    if chat:
        answer = {"message": {"role": "assistant", "content": text, "refusal": None}}
    if chat and "tool_calls" in choice:
        answer["message"] |= {"content": choice["content"], "tool_calls": choice["tool_calls"]}
        reason = "tool_calls" if reason == "stop" else reason
    logprobs = choice.get("logprobs")
    if logprobs is not None:
        logprobs = {**logprobs, "refusal": None} if chat else _completion_logprobs(logprobs["content"])
    return {"index": place, **answer, "logprobs": logprobs, "finish_reason": reason}


def _completion_logprobs(content: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The form that /v1/completions has for them; offsets count the characters of the tokens before."""
    tokens = [each["token"] for each in content]
    return {
        "text_offset": list(accumulate(map(len, tokens[:-1]), initial=0)) if tokens else [],
        "token_logprobs": [each["logprob"] for each in content],
        "tokens": tokens,
        "top_logprobs": [{top["token"]: top["logprob"] for top in (*each["top_logprobs"], each)} for each in content],
    }


_TOOLS: dict[str, Check] = {"tools": tools, "tool_choice": tool_choice, "parallel_tool_calls": BOOLEAN}
_ASKS_NOTHING: dict[str, Check] = {
    "suffix": only(), "stream": only(False), "stream_options": only(), "tools": only([]),
    "tool_choice": only("none", "auto"), "parallel_tool_calls": only(False, True), "functions": only([]),
    "function_call": only("none", "auto"), "modalities": only(["text"]), "audio": only(), "prediction": only(),
    "reasoning_effort": only(), "verbosity": only(), "web_search_options": only(), "prompt_cache_key": only(),
    "safety_identifier": only(),
}  # fmt: skip
_NO_TEMPLATE, _NO_MESSAGES = refused("goes with messages alone"), refused("and prompt exclude each other")
_BODY = SHARED | _ASKS_NOTHING
_CHAT = _BODY | _TOOLS | CHAT_SAMPLING | {"messages": messages, "chat_template_kwargs": OBJECT}
_COMPLETION = _BODY | PROMPT_SAMPLING | {"prompt": _completion_prompt, "chat_template_kwargs": _NO_TEMPLATE}

GENERATION = Forms(
    GenerationRequest.kind,
    lines={
        "prompt": LineForm(_COMPLETION | {"prompt": STRING, "messages": _NO_MESSAGES}, "prompt"),
        "messages": LineForm(_CHAT | {"prompt": STRING}, "messages"),
    },
    bodies={"/chat/completions": LineForm(_CHAT, "messages"), "/completions": LineForm(_COMPLETION, "prompt")},
    request=_request,
    options=frozenset({each.name for each in fields(SamplingParams)} | {"system", "chat_template_kwargs", "adapters"}),
    answer=_answer,
    columns=("text", "finish_reason"),
    response=_response,
)
