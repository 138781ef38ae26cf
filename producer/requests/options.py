"""What a line or a job's flags may ask of the sampler -> SamplingParams: every option, its limits and its spellings.

It owns the names that the OpenAI API and vLLM have for the same things, and what contradicts what. It does not know
what an engine makes of an option, nor whether a schema or a regular expression is one that a grammar can be made of.

An option at its neutral value (`n` 1, a penalty of 0) is kept, since a line's values win over its job's; what is
empty, as `[]` or a `response_format` of text, asks for nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from batchmill.jobs.requests.generation import NO_SAMPLING, SamplingParams
from batchmill.producer.requests.checks import (
    BOOLEAN,
    OBJECT,
    STRING,
    BadLine,
    Check,
    filled_text,
    integer,
    kind,
    list_of,
    number,
    one_of,
    only,
    shown,
    take,
    take_each,
)

MAX_STOPS = 16
#: So many tokens `logit_bias` and `stop_token_ids` name at most, and so many answers a `choice` is among.
MAX_NAMED = 1_024
MAX_CHOICES = 128
MAX_TOP_LOGPROBS = 20
MAX_BIAS = 100
MAX_INT32, MAX_INT64 = 2**31 - 1, 2**63 - 1

_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,9}")
_FORMATS = ("text", "json_object", "json_schema", "regex", "choice")


def sampling_of(taken: dict[str, Any]) -> SamplingParams:
    """The parameters of what the checks of this module let through, under whichever names. Raises BadLine."""
    _merge_spellings(taken)
    _merge_formats(taken)
    if (top := taken.get("top_logprobs")) is not None and not taken.get("logprobs"):
        if top:
            raise BadLine("needs logprobs to be true", "top_logprobs")
        del taken["top_logprobs"]
    least, most = taken.get("min_tokens"), taken.get("max_tokens")
    if least is not None and most is not None and least > most:
        raise BadLine(f"is {least}, which is more than max_tokens, {most}", "min_tokens")
    return SamplingParams(**taken) if taken else NO_SAMPLING


def sampling_of_flags(asked: Mapping[str, Any]) -> SamplingParams:
    """The same of a job's flags, by the names of SamplingParams and in JSON's values. Raises BadLine."""
    return sampling_of(take(asked, CHAT_SAMPLING))


def _merge_spellings(taken: dict[str, Any]) -> None:
    """Leaves one name of each thing that has several."""
    completion = taken.pop("max_completion_tokens", None)
    if completion is not None and taken.setdefault("max_tokens", completion) != completion:
        raise BadLine("and max_tokens differ; give one of them", "max_completion_tokens")
    best_of, choices = taken.pop("best_of", None), taken.get("n", 1)
    if best_of is not None and best_of != choices:
        raise BadLine(f"must equal n, which is {choices}, not {best_of}: all choices are returned", "best_of")
    count = taken.get("logprobs")
    if type(count) is int:  # a number is what /v1/completions calls top_logprobs
        taken["logprobs"] = True
        if taken.setdefault("top_logprobs", count) != count:
            raise BadLine("and logprobs differ; give one of them", "top_logprobs")


def _merge_formats(taken: dict[str, Any]) -> None:
    """Leaves `response_format` of all the keys that say what an answer has to look like."""
    found = {key: taken.pop(key) for key in _FORMAT_KEYS if key in taken}
    (first, form), *others = found.items() or [("", None)]
    for key, other in others:
        if other != form:
            raise BadLine(f"and {first} contradict each other; give one of them", key)
    if form is not None:
        taken["response_format"] = form


def _logit_bias(value: Any) -> tuple[tuple[int, float], ...] | None:
    if type(value) is not dict or len(value) > MAX_NAMED:
        given = f"one of {len(value)}" if type(value) is dict else kind(value)
        raise BadLine(f"must be an object of at most {MAX_NAMED} token ids, not {given}")
    return tuple((_token_id(key), _bias(key, each)) for key, each in value.items()) or None


def _token_id(key: str) -> int:
    if _TOKEN_ID.fullmatch(key) and int(key) <= MAX_INT32:
        return int(key)
    raise BadLine(f'must have token ids as keys, as in {{"50256": -100}}, not {shown(key)}')


def _bias(key: str, value: Any) -> Any:
    try:
        return _BIAS(value)
    except BadLine as exc:
        raise exc.inside(f"[{key}]") from None


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


def _logprobs_or_count(value: Any) -> bool | int:
    if type(value) is bool or (type(value) is int and 0 <= value <= MAX_TOP_LOGPROBS):
        return value
    raise BadLine(f"must be true, false or an integer from 0 to {MAX_TOP_LOGPROBS}, not {shown(value)}")


def _response_format(value: Any) -> dict[str, Any] | None:
    """One of `{"type": "json_object"}`, `{"type": "json_schema", "schema": ...}` and so on; None for text."""
    form = OBJECT(value)
    if form.get("type") is None:
        raise BadLine(f"is missing or null; it is one of {', '.join(_FORMATS)}", "type")
    try:
        name = one_of(*_FORMATS)(form["type"])
    except BadLine as exc:
        raise exc.inside("type") from None
    asked = take(form, _TYPE | _FORM_KEYS[name])
    return None if name == "text" else _form(name, asked)


def _form(name: str, asked: Mapping[str, Any]) -> dict[str, Any]:
    if name == "json_object":
        return {"type": name}
    spellings = [key for key in _FORM_KEYS[name] if key in asked]
    if not spellings:
        raise BadLine("is missing or null", next(iter(_FORM_KEYS[name])))
    if len(spellings) > 1:
        raise BadLine(f"and {spellings[0]} exclude each other; give one of them", spellings[1])
    return _formed(name, asked[spellings[0]])


def _formed(name: str, what: Any) -> dict[str, Any]:
    return {"type": name, "schema" if name == "json_schema" else name: what}


def _named_schema(value: Any) -> dict[str, Any]:
    """The schema in OpenAI's object; its name and description are for people, and every schema is kept to."""
    schema: dict[str, Any] = take(OBJECT(value), _NAMED_SCHEMA, "schema")["schema"]
    return schema


def _choices(value: Any) -> list[str]:
    if type(value) is list and 0 < len(value) <= MAX_NAMED:
        return take_each(value, filled_text)
    raise BadLine(f"must be a list of 1 to {MAX_NAMED} strings")


def _guided(name: str, check: Check) -> Check:
    """vLLM's key for one form of answer."""
    return lambda value: _formed(name, check(value))


def _json_object(value: Any) -> dict[str, Any] | None:
    return {"type": "json_object"} if BOOLEAN(value) else None


def _structured_outputs(value: Any) -> dict[str, Any] | None:
    found = take(OBJECT(value), _STRUCTURED)
    if len(found) > 1:
        first, second, *_ = found
        raise BadLine(f"and {first} exclude each other; give one of them", second)
    form: dict[str, Any] | None = next(iter(found.values()), None)
    return form


_BIAS = number(-MAX_BIAS, MAX_BIAS)
_NAMED_SCHEMA: dict[str, Check] = {"name": STRING, "description": STRING, "strict": BOOLEAN, "schema": OBJECT}
_TYPE: dict[str, Check] = {"type": STRING}
_FORM_KEYS: dict[str, dict[str, Check]] = {
    "text": {},
    "json_object": {},
    "json_schema": {"json_schema": _named_schema, "schema": OBJECT},
    "regex": {"regex": filled_text, "pattern": filled_text},
    "choice": {"choice": _choices},
}
_STRUCTURED: dict[str, Check] = {
    "json": _guided("json_schema", OBJECT),
    "regex": _guided("regex", filled_text),
    "choice": _guided("choice", _choices),
    "json_object": _json_object,
}
_FORMATTING: dict[str, Check] = {
    "response_format": _response_format,
    "guided_json": _STRUCTURED["json"],
    "guided_regex": _STRUCTURED["regex"],
    "guided_choice": _STRUCTURED["choice"],
    "structured_outputs": _structured_outputs,
}
_FORMAT_KEYS = tuple(_FORMATTING)
_PENALTY = number(-2, 2)
_SAMPLING: dict[str, Check] = {
    "max_tokens": integer(1, MAX_INT32),
    "max_completion_tokens": integer(1, MAX_INT32),
    "min_tokens": integer(0, MAX_INT32),
    "temperature": number(0, 100),
    "top_p": number(0, 1),
    "top_k": _top_k,
    "min_p": number(0, 1),
    "repetition_penalty": number(0, 100, above=True),
    "presence_penalty": _PENALTY,
    "frequency_penalty": _PENALTY,
    "logit_bias": _logit_bias,
    "stop": _stop,
    "stop_token_ids": list_of(integer(0, MAX_INT32), "token ids", most=MAX_NAMED),
    "ignore_eos": BOOLEAN,
    "seed": integer(-MAX_INT64 - 1, MAX_INT64),
    "n": integer(1, MAX_CHOICES),
    "best_of": integer(1, MAX_CHOICES),
    "echo": only(False),
    "top_logprobs": integer(0, MAX_TOP_LOGPROBS),
}
#: The checks of the keys beside `messages`, and of those beside a `prompt`, by key.
CHAT_SAMPLING = _SAMPLING | _FORMATTING | {"logprobs": BOOLEAN}
PROMPT_SAMPLING = CHAT_SAMPLING | {"logprobs": _logprobs_or_count}
