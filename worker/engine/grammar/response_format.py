"""Turns a request's response_format into the text of a grammar, or refuses it for its shape or its size.

Owns the four types and the shape of each; it knows no tokenizer and compiles nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from llguidance import LLMatcher

from batchmill.jobs.requests.request import ErrorCode
from batchmill.jobs.runtime.logs import get_logger
from batchmill.worker.engine.grammar.schema import exact
from batchmill.worker.engine.refused import Refused

log = get_logger(__name__)

#: The most characters of a schema, a regex, or all choices together.
MAX_TEXT_LENGTH = 65_536
#: Whitespace between two tokens of JSON. It is bounded, since a model could write spaces for ever.
WHITESPACE = r"[ \t]{1,2}|\r?\n[ \t]{0,32}"
#: The key by which a schema gives the library options; ours alone hold.
_OPTIONS = "x-guidance"


def grammar_text(response_format: Mapping[str, Any]) -> str:
    """Writes the grammar as llguidance reads it. Raises Refused."""
    kind = response_format.get("type")
    if kind == "json_object":
        return _schema_text({"type": "object"})
    if kind == "json_schema":
        return _schema_text(response_format.get("schema"))
    if kind == "regex":
        return _regex_text(response_format.get("regex"))
    if kind == "choice":
        return _choice_text(response_format.get("choice"))
    raise _refused("its type is none of json_object, json_schema, regex and choice")


def _schema_text(schema: Any) -> str:
    if not isinstance(schema, Mapping):
        raise _refused("its schema is not an object")
    try:
        _check("schema", json.dumps(schema, separators=(",", ":"), ensure_ascii=False))
        own, unknown = exact(schema)
        if unknown:
            log.info("formats of a schema are not checked", formats=sorted(unknown))
        return json.dumps({"grammars": [{"json_schema": own | {_OPTIONS: {"whitespace_pattern": WHITESPACE}}}]})
    except RecursionError:
        raise _refused("its schema is nested too deeply") from None


def _regex_text(regex: Any) -> str:
    if not isinstance(regex, str):
        raise _refused("its regex is not a string")
    _check("regex", regex)
    return LLMatcher.grammar_from_regex(regex)


def _choice_text(choices: Any) -> str:
    if not isinstance(choices, list | tuple) or not choices or not all(isinstance(each, str) for each in choices):
        raise _refused("its choice is not a list of one or more strings")
    _check("choice", "".join(choices))
    return "start: CHOICE\nCHOICE: " + " | ".join(json.dumps(each) for each in dict.fromkeys(choices))


def _check(name: str, text: str) -> None:
    if any("\ud800" <= each <= "\udfff" for each in text):
        raise _refused(f"its {name} has half of a surrogate pair")
    if len(text) > MAX_TEXT_LENGTH:
        raise _refused(f"its {name} has {len(text)} characters, and at most {MAX_TEXT_LENGTH} are taken")


def _refused(reason: str) -> Refused:
    return Refused(ErrorCode.INVALID_RESPONSE_FORMAT, f"response_format was refused: {reason}")
