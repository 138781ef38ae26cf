"""Checks of what a line may ask of the sampler, where a number or a list of texts does not tell it all.

They own the limits of these values, the spellings that the OpenAI API and vLLM have for the form of an answer, and the
messages about bad ones. They do not know whether a grammar can be made of a schema or a regular expression.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from batchmill.producer.requests.checks import (
    BOOLEAN,
    OBJECT,
    STRING,
    BadLine,
    Check,
    filled_text,
    kind,
    number,
    one_of,
    shown,
    take,
    take_each,
)

MAX_STOPS = 16
#: The most tokens that `logit_bias` and `stop_token_ids` name, and the most answers of a `choice`.
MAX_NAMED = 1_024
MAX_TOP_LOGPROBS = 20
MAX_BIAS = 100
MAX_INT32 = 2**31 - 1

_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,9}")
_FORMATS = ("text", "json_object", "json_schema", "regex", "choice")


def logit_bias(value: Any) -> tuple[tuple[int, float], ...] | None:
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


def top_k(value: Any) -> int | None:
    if type(value) is int and -1 <= value <= MAX_INT32:
        return value if value > 0 else None
    raise BadLine(f"must be an integer from 1 to {MAX_INT32}, or 0 or -1 for no limit, not {shown(value)}")


def stop(value: Any) -> tuple[str, ...] | None:
    if value in ("", []):
        return None
    stops = [value] if type(value) is str else value
    if type(stops) is list and len(stops) <= MAX_STOPS and all(type(each) is str and each for each in stops):
        return tuple(stops)
    raise BadLine(f"must be a string or a list of at most {MAX_STOPS} strings, none of them empty")


def logprobs_or_count(value: Any) -> bool | int:
    if type(value) is bool or (type(value) is int and 0 <= value <= MAX_TOP_LOGPROBS):
        return value
    raise BadLine(f"must be true, false or an integer from 0 to {MAX_TOP_LOGPROBS}, not {shown(value)}")


def response_format(value: Any) -> dict[str, Any] | None:
    """One of `{"type": "json_object"}`, `{"type": "json_schema", "schema": ...}` and so on; None for text."""
    form = OBJECT(value)
    if form.get("type") is None:
        raise BadLine(f"is missing or null; it is one of {', '.join(_FORMATS)}", "type")
    try:
        name = one_of(*_FORMATS)(form["type"])
    except BadLine as exc:
        raise exc.inside("type") from None
    taken = take(form, _TYPE | _FORM_KEYS[name])
    return None if name == "text" else _form(name, taken)


def _form(name: str, taken: Mapping[str, Any]) -> dict[str, Any]:
    if name == "json_object":
        return {"type": name}
    spellings = [key for key in _FORM_KEYS[name] if key in taken]
    if not spellings:
        raise BadLine("is missing or null", next(iter(_FORM_KEYS[name])))
    if len(spellings) > 1:
        raise BadLine(f"and {spellings[0]} exclude each other; give one of them", spellings[1])
    return _formed(name, taken[spellings[0]])


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


def structured_outputs(value: Any) -> dict[str, Any] | None:
    taken = take(OBJECT(value), STRUCTURED)
    if len(taken) > 1:
        first, second, *_ = taken
        raise BadLine(f"and {first} exclude each other; give one of them", second)
    form: dict[str, Any] | None = next(iter(taken.values()), None)
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
#: vLLM's keys for the forms of an answer, of which `structured_outputs` has one.
STRUCTURED: dict[str, Check] = {
    "json": _guided("json_schema", OBJECT),
    "regex": _guided("regex", filled_text),
    "choice": _guided("choice", _choices),
    "json_object": _json_object,
}
