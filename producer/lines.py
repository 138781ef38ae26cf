"""One line of a prompt file, decoded -> one Request: which keys a line may have, and which values.

It owns the forms of a line, the check of every key, and the words for what is wrong. It does not know files,
bytes, JSON text or line numbers (producer.prompts does), nor whether a custom_id is unique (the store does).

Whatever a line says is obeyed, kept and returned, or refused by name; a null asks for nothing. What is said
about a bad line may show a key or a parameter, cut short, and never a prompt.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from jobs.schema import CUSTOM_ID_LENGTH, NO_SAMPLING, Request, SamplingParams

MAX_STOPS = 16
SHOWN_LENGTH = 40
MAX_INT32, MAX_INT64 = 2**31 - 1, 2**63 - 1
ROLES = ("system", "developer", "user", "assistant", "tool", "function")

#: Takes what one key holds, never null, and returns what is kept of it: None where it asks for nothing.
Check = Callable[[Any], Any]

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_KINDS = {
    str: "a string", int: "a number", float: "a number", bool: "a boolean", list: "a list", dict: "an object"
}  # fmt: skip


class BadLine(Exception):
    """A line that cannot be taken; its text says where in it (`at`: a key, or empty) and what is wrong."""

    def __init__(self, what: str, at: str = "") -> None:
        super().__init__(f"{at} {what}" if at else what)
        self.what, self.at = what, at

    def inside(self, name: str) -> BadLine:
        """The same, one level up: `name` is the key, or the `[place]`, that holds `at`."""
        dot = "." if self.at and not self.at.startswith("[") else ""
        return BadLine(self.what, f"{name}{dot}{self.at}")


def json_request(line: Any, index: int, *, check_model: Callable[[str], None]) -> Request:
    """The request of one decoded line of JSON; `check_model` is given the model that it names.

    Raises BadLine, as `check_model` may.
    """
    if type(line) is not dict:
        raise BadLine(f"must be a JSON object, not {_kind(line)}")
    if line.get("prompt") is not None:
        taken = _take(line, _SHORT_PROMPT, "prompt")
    elif line.get("messages") is not None:
        taken = _take(line, _SHORT_CHAT, "messages")
    elif "body" in line or "url" in line:
        taken = _openai_batch(line)
    else:
        raise BadLine("holds no prompt, no messages, and no url and body of an OpenAI Batch line")
    if "model" in taken:
        check_model(taken.pop("model"))
    return _request(taken, index)


def text_request(line: str, index: int) -> Request:
    """The request of one line of plain text; BadLine if no database can hold it."""
    if "\0" in line:
        raise BadLine("holds a NUL character")
    return Request(index, f"request-{index}", line)


def shown(value: Any) -> str:
    """A key or a parameter as a message shows it: cut short, and of a list or an object its kind alone."""
    if value is None or type(value) is bool:
        return json.dumps(value)
    text = _kind(value) if type(value) in (list, dict) else repr(value)
    return text if len(text) <= SHOWN_LENGTH else text[: SHOWN_LENGTH - 3] + "..."


def _openai_batch(line: dict[str, Any]) -> dict[str, Any]:
    envelope = _take(line, _ENVELOPE, "url", "body")
    checks, content = _ENDPOINTS[envelope["url"]]
    try:
        taken = _take(envelope["body"], checks, content)
    except BadLine as exc:
        raise exc.inside("body") from None
    if "custom_id" in envelope:
        taken["custom_id"] = envelope["custom_id"]
    return taken


def _request(taken: dict[str, Any], index: int) -> Request:
    custom_id = taken.pop("custom_id", None) or f"request-{index}"
    prompt, messages = taken.pop("prompt", None), taken.pop("messages", None)
    template = taken.pop("chat_template_kwargs", None) or None
    if not taken:
        return Request(index, custom_id, prompt, messages, NO_SAMPLING, template)
    kept = {key: taken.pop(key) for key in _KEPT if key in taken}
    return Request(index, custom_id, prompt, messages, _sampling(taken), template, kept or None)


def _sampling(asked: dict[str, Any]) -> SamplingParams:
    completion = asked.pop("max_completion_tokens", None)
    if completion is not None and asked.setdefault("max_tokens", completion) != completion:
        raise BadLine("and max_tokens differ; give one of them", "max_completion_tokens")
    return SamplingParams(**asked) if asked else NO_SAMPLING


def _take(value: Mapping[str, Any], checks: Mapping[str, Check], *needed: str) -> dict[str, Any]:
    """What an object asks for, key by key; a key without a check is refused, as is an absent `needed` one."""
    taken = {}
    for key, each in value.items():
        check = checks.get(key)
        if check is None:
            raise BadLine("is not supported here; remove it", shown(key))
        if each is not None:
            try:
                kept = check(each)
            except BadLine as exc:
                raise exc.inside(key) from None
            if kept is not None:
                taken[key] = kept
    for key in needed:
        if key not in taken:
            raise BadLine("is missing or null", key)
    return taken


def _each(values: list[Any], check: Check) -> list[Any]:
    """Every value as its check returns it; a refusal says at which place."""
    kept: list[Any] = []
    try:
        for value in values:
            kept.append(check(value))
    except BadLine as exc:
        raise exc.inside(f"[{len(kept)}]") from None
    return kept


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), "null")


def _integer(low: int, high: int) -> Check:
    def check(value: Any) -> int:
        if type(value) is int and low <= value <= high:
            return value
        raise BadLine(f"must be an integer from {low} to {high}, not {shown(value)}")

    return check


def _number(low: int, high: int, *, above: bool = False) -> Check:
    def check(value: Any) -> float:
        if type(value) in (int, float) and low <= value <= high and not (above and value == low):
            return float(value)
        bounds = f"above {low} and at most {high}" if above else f"from {low} to {high}"
        raise BadLine(f"must be a number {bounds}, not {shown(value)}")

    return check


def _of(wanted: type) -> Check:
    def check(value: Any) -> Any:
        if type(value) is wanted:
            return value
        raise BadLine(f"must be {_KINDS[wanted]}, not {_kind(value)}")

    return check


def _one_of(*accepted: str) -> Check:
    def check(value: Any) -> Any:
        if type(value) is str and value in accepted:
            return value
        raise BadLine(f"must be one of {', '.join(accepted)}; it is {shown(value)}")

    return check


def _only(*accepted: Any) -> Check:
    """The check of a key that is not supported, but for the values that ask for nothing."""

    def check(value: Any) -> None:
        if not any(type(value) is type(each) and value == each for each in accepted):
            instead = f" or write {json.dumps(accepted[0])}" if accepted else ""
            given = f" as {shown(value)}" if type(value) in (bool, int, float) else ""
            raise BadLine(f"is not supported{given}; remove it{instead}")

    return check


def _refused(why: str) -> Check:
    def check(value: Any) -> NoReturn:
        raise BadLine(why)

    return check


def _top_k(value: Any) -> int | None:
    if type(value) is int and -1 <= value <= MAX_INT32:
        return value if value > 0 else None
    raise BadLine(f"must be an integer from 1 to {MAX_INT32}, or 0 or -1 for no limit, not {shown(value)}")


def _stop(value: Any) -> tuple[str, ...] | None:
    if value in ("", []):
        return None
    stops = [value] if type(value) is str else value
    if type(stops) is list and len(stops) <= MAX_STOPS and all(type(each) is str and each for each in stops):
        return tuple(stops)
    raise BadLine(f"must be a string or a list of at most {MAX_STOPS} strings, none of them empty")


def _custom_id(value: Any) -> str:
    if type(value) is str and 0 < len(value) <= CUSTOM_ID_LENGTH and not _CONTROL.search(value):
        return value
    wanted = f"1 to {CUSTOM_ID_LENGTH} characters, none of them control characters"
    raise BadLine(f"must be a string of {wanted}; it is {shown(value)}")


def _model(value: Any) -> str:
    if type(value) is str and value:
        return value
    raise BadLine(f"must be the name of a model, not {shown(value)}")


def _completion_prompt(value: Any) -> Any:
    if type(value) is not list:
        return _STRING(value)
    if len(value) == 1 and type(value[0]) is str:
        return value[0]
    raise BadLine("must be one string: tokens are not supported, and each prompt has a line of its own")


def _content(value: Any) -> str:
    if type(value) is str:
        return value
    if type(value) is not list or not value:
        raise BadLine("must be a string or a list of text parts")
    return "".join(_each(value, _part))


def _part(value: Any) -> Any:
    if type(value) is dict and value.get("type") == "text":
        return _take(value, _PART, "text")["text"]
    given = f", not {shown(value.get('type'))}" if type(value) is dict else ""
    raise BadLine(f"must be a part of type 'text'{given}")


def _messages(value: Any) -> tuple[dict[str, Any], ...]:
    if type(value) is not list or not value:
        raise BadLine("must be a list of at least one message")
    return tuple(_each(value, _message))


def _message(value: Any) -> dict[str, Any]:
    if type(value) is not dict:
        raise BadLine(f"must be an object, not {_kind(value)}")
    return _take(value, _MESSAGE, "role", "content")


_STRING, _OBJECT, _BOOLEAN = _of(str), _of(dict), _of(bool)
_PART: dict[str, Check] = {"type": _STRING, "text": _STRING}
_MESSAGE: dict[str, Check] = {
    "role": _one_of(*ROLES), "content": _content, "name": _STRING, "tool_calls": _only([]),
    "annotations": _only([]), "refusal": _only(), "function_call": _only(), "audio": _only(),
}  # fmt: skip
_KEPT: dict[str, Check] = {"user": _STRING, "metadata": _OBJECT, "store": _BOOLEAN, "service_tier": _STRING}
_SAMPLING: dict[str, Check] = {
    "max_tokens": _integer(1, MAX_INT32),
    "max_completion_tokens": _integer(1, MAX_INT32),
    "temperature": _number(0, 100),
    "top_p": _number(0, 1, above=True),
    "top_k": _top_k,
    "min_p": _number(0, 1),
    "repetition_penalty": _number(0, 100, above=True),
    "stop": _stop,
    "seed": _integer(-MAX_INT64 - 1, MAX_INT64),
}
_ASKS_NOTHING: dict[str, Check] = {
    "n": _only(1), "best_of": _only(1), "echo": _only(False), "suffix": _only(), "stream": _only(False),
    "stream_options": _only(), "presence_penalty": _only(0, 0.0), "frequency_penalty": _only(0, 0.0),
    "logit_bias": _only({}), "logprobs": _only(False), "top_logprobs": _only(0), "tools": _only([]),
    "tool_choice": _only("none", "auto"), "parallel_tool_calls": _only(False, True), "functions": _only([]),
    "function_call": _only("none", "auto"), "response_format": _only({"type": "text"}),
    "modalities": _only(["text"]), "audio": _only(), "prediction": _only(), "reasoning_effort": _only(),
    "verbosity": _only(), "web_search_options": _only(), "prompt_cache_key": _only(),
    "safety_identifier": _only(),
}  # fmt: skip
_BODY = {"model": _model} | _SAMPLING | _KEPT | _ASKS_NOTHING
_NO_TEMPLATE, _NO_MESSAGES = _refused("goes with messages alone"), _refused("and prompt exclude each other")
_CHAT = _BODY | {"messages": _messages, "chat_template_kwargs": _OBJECT}
_COMPLETION = _BODY | {"prompt": _completion_prompt, "chat_template_kwargs": _NO_TEMPLATE}
_SHORT_CHAT = _CHAT | {"custom_id": _custom_id, "prompt": _STRING}
_SHORT_PROMPT = _COMPLETION | {"custom_id": _custom_id, "prompt": _STRING, "messages": _NO_MESSAGES}
_ENDPOINTS = {"/v1/chat/completions": (_CHAT, "messages"), "/v1/completions": (_COMPLETION, "prompt")}
_ENVELOPE = {"custom_id": _custom_id, "method": _one_of("POST"), "url": _one_of(*_ENDPOINTS), "body": _OBJECT}
