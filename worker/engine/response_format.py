"""A request's response_format becomes the text of a grammar, or is refused for its shape or its size.

Owns the four types and the bounds that keep a hostile one from taking hours or the process; it knows no tokenizer and
compiles nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any

from llguidance import LLMatcher

from jobs.schema import ErrorCode
from worker.engine.tokenization import Refused

#: A schema, or all choices together, in so many characters of JSON. Stack and time were measured up to here.
MAX_TEXT_LENGTH = 65_536
#: Compiling takes time by the square of a regex's length, and of the members of one object.
MAX_REGEX_LENGTH = 4_096
MAX_MEMBERS = 1_000
#: `multipleOf` becomes an automaton of as many states as the number that all of them divide, one for each of them.
MAX_MULTIPLE_STATES = 200_000
#: Any two patterns for the names of properties are compared, which takes up to a tenth of a second.
MAX_NAME_PATTERNS = 16
#: What may stand between two signs of JSON: a model could write spaces for ever, but not a line break and an indent.
WHITESPACE = r"[ \t]{1,2}|\r?\n[ \t]{0,32}"
#: The key by which a schema gives the library options; ours alone hold.
_OPTIONS = "x-guidance"


def grammar_text(response_format: Mapping[str, Any]) -> str:
    """The grammar, as llguidance reads it. Equal ones have equal texts. Raises Refused."""
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
    own = {key: value for key, value in schema.items() if key != _OPTIONS}
    _check_schema(own)
    options = {_OPTIONS: {"whitespace_pattern": WHITESPACE}}
    return json.dumps({"grammars": [{"json_schema": own | options}]})


def _check_schema(schema: Mapping[str, Any]) -> None:
    try:
        length = len(json.dumps(schema, separators=(",", ":"), ensure_ascii=False))
    except RecursionError:
        raise _refused("its schema is nested too deeply") from None
    if length > MAX_TEXT_LENGTH:
        raise _refused(f"its schema has {length} characters, and at most {MAX_TEXT_LENGTH} are taken")
    objects = list(_objects(schema))
    if any(len(each) > MAX_MEMBERS for each in objects):
        raise _refused(f"its schema has an object of more than {MAX_MEMBERS} members")
    patterns = [each["patternProperties"] for each in objects if isinstance(each.get("patternProperties"), Mapping)]
    if sum(map(len, patterns)) > MAX_NAME_PATTERNS:
        raise _refused(f"its schema has more than {MAX_NAME_PATTERNS} patterns for names of properties")
    multiples = [each["multipleOf"] for each in objects if isinstance(each.get("multipleOf"), int | float)]
    if multiples and _common_multiple(multiples) * len(multiples) > MAX_MULTIPLE_STATES:
        raise _refused("its schema asks for multiples of numbers that are too large, too fine or too many")


def _objects(schema: Any) -> Iterator[Mapping[str, Any]]:
    """Every object within a schema, itself included."""
    waiting = [schema]
    while waiting:
        each = waiting.pop()
        if isinstance(each, Mapping):
            yield each
            waiting.extend(each.values())
        elif isinstance(each, list | tuple):
            waiting.extend(each)


def _common_multiple(numbers: Sequence[float]) -> float:
    """The least number that all of these divide, in units of the last decimal place that any of them has."""
    written = [abs(Decimal(str(each))) for each in numbers]
    if not all(each.is_finite() and each.adjusted() < len(str(MAX_MULTIPLE_STATES)) for each in written):
        return math.inf
    places = max(max(0, -int(each.as_tuple().exponent)) for each in written)
    return math.lcm(*(int(each.scaleb(places)) for each in written))


def _regex_text(regex: Any) -> str:
    if not isinstance(regex, str):
        raise _refused("its regex is not a string")
    if len(regex) > MAX_REGEX_LENGTH:
        raise _refused(f"its regex has {len(regex)} characters, and at most {MAX_REGEX_LENGTH} are taken")
    try:
        return LLMatcher.grammar_from_regex(regex)
    except UnicodeEncodeError:
        raise _refused("its regex holds half of a surrogate pair") from None


def _choice_text(choices: Any) -> str:
    if not isinstance(choices, list | tuple) or not choices or not all(isinstance(each, str) for each in choices):
        raise _refused("its choice is not a list of one or more strings")
    written = " | ".join(json.dumps(each) for each in dict.fromkeys(choices))
    if len(written) > MAX_TEXT_LENGTH:
        raise _refused(f"its choices have {len(written)} characters, and at most {MAX_TEXT_LENGTH} are taken")
    return f"start: CHOICE\nCHOICE: {written}"


def _refused(reason: str) -> Refused:
    return Refused(ErrorCode.INVALID_RESPONSE_FORMAT, f"response_format was refused: {reason}")
