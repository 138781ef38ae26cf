"""The calls of tools within an answer, in OpenAI's form, for the ways of writing them that are known.

Owns three ways, each told by the text of the model's chat template: `<tool_call>{json}</tool_call>` (Hermes, Qwen),
`[TOOL_CALLS]` before JSON (Mistral), and `{"name": ..., "parameters": ...}` alone (Llama 3.1). A call that is not well
formed stays text.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

#: Letters and digits of a call's id: some templates take no other length.
ID_LENGTH = 9
_TAG, _END_TAG = "<tool_call>", "</tool_call>"
_MARK, _ARGUMENTS = "[TOOL_CALLS]", "[ARGS]"
_PYTHON_TAG = "<|python_tag|>"
_NAMED = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\]\w+)?\[ARGS\]")


#: Functions with their arguments, and the text beside them.
_Parsed = tuple[list[tuple[str, Any]], str]


class Called(NamedTuple):
    """The calls of an answer, and the rest of its text, None for nothing."""

    calls: list[dict[str, Any]]
    content: str | None


class Calls:
    """The way in which a model with this chat template calls tools; `marks`: its signs that may be special tokens."""

    def __init__(self, template: object) -> None:
        written = str(template or "")
        self._read: Callable[[str, Collection[str]], _Parsed] | None = None
        if _MARK in written:
            self._read = _marked
        elif _TAG in written and _END_TAG in written:
            self._read = _tagged
        elif "dictionary of argument name and its value" in written:
            self._read = _alone
        self.marks = (_TAG, _END_TAG, _MARK, _ARGUMENTS, "[CALL_ID]", _PYTHON_TAG)

    @property
    def known(self) -> bool:
        """True where calls can be told from text at all."""
        return self._read is not None

    def of(self, text: str, tools: Collection[str], *, named: str) -> Called | None:
        """The calls in a text, None where there are none; their ids follow from the answer's own name, `named`."""
        if self._read is None:
            return None
        try:
            functions, rest = self._read(text, tools)
            calls = [_call(function, f"{named}/{number}") for number, function in enumerate(functions)]
        except (ValueError, RecursionError):
            return None
        return Called(calls, rest.strip() or None) if calls else None


def _tagged(text: str, _: Collection[str]) -> _Parsed:
    functions, rest = [], ""
    before, tag, text = text.partition(_TAG)
    while tag:
        value, text = _json(text)
        after, end, text = text.partition(_END_TAG)
        functions.append(_function(value, "arguments"))
        if not end or after.strip():
            raise ValueError("no end of a call")
        rest += before
        before, tag, text = text.partition(_TAG)
    return functions, rest + before


def _marked(text: str, _: Collection[str]) -> _Parsed:
    rest, *parts = text.split(_MARK)
    functions: list[tuple[str, Any]] = []
    for part in parts:
        named = _NAMED.match(part)
        value, after = _json(part[named.end() :] if named else part)
        if after.strip():
            raise ValueError("text behind a call")
        functions += [(named[1], value)] if named else [_function(each, "arguments") for each in _listed(value)]
    return functions, rest


def _alone(text: str, tools: Collection[str]) -> _Parsed:
    functions, rest = [], text.strip().removeprefix(_PYTHON_TAG)
    if not rest.startswith("{"):
        return [], text
    while rest:
        value, rest = _json(rest)
        functions.append(_function(value, "parameters"))
        rest = rest.strip()
        if functions[-1][0] not in tools or (rest and not rest.startswith(";")):
            raise ValueError("JSON that calls no tool")
        rest = rest.removeprefix(";").strip()
    return functions, ""


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _function(value: Any, arguments: str) -> tuple[str, Any]:
    if isinstance(value, dict) and arguments in value:
        return value.get("name", ""), value[arguments]
    raise ValueError("no call")


def _json(text: str) -> tuple[Any, str]:
    """Splits a text into the JSON value at its beginning, and the rest."""
    stripped = text.lstrip()
    value, end = json.JSONDecoder(parse_constant=_refuse).raw_decode(stripped)
    return value, stripped[end:]


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _call(function: tuple[str, Any], named: str) -> dict[str, Any]:
    name, arguments = function
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        raise ValueError("no call")
    written = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    f"{name}{written}".encode()  # half of a surrogate pair is no text
    digest = hashlib.sha256(named.encode(errors="backslashreplace")).hexdigest()
    return {"id": digest[:ID_LENGTH], "type": "function", "function": {"name": name, "arguments": written}}
