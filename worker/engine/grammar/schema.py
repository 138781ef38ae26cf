"""Checks a JSON schema before it becomes a grammar: a keyword that the library would keep only nearly is refused.

Owns numbers that no float holds, formats that nobody checks, and patterns to which properties leave no name. A format
that the library does not know is an annotation, as JSON Schema has it: it is taken out, and logged.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypeGuard

from llguidance import LLMatcher

from batchmill.jobs.requests.request import ErrorCode
from batchmill.worker.engine.refused import Refused

#: Keywords whose values are data, and those whose values are schemas by name.
_DATA = frozenset({"const", "enum", "default", "examples"})
_BY_NAME = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
#: Each exclusive bound, and those on the other side.
_FACING = {"exclusiveMinimum": ("maximum", "exclusiveMaximum"), "exclusiveMaximum": ("minimum", "exclusiveMinimum")}
_MAX_INT64 = 2**63 - 1
#: The most different patternProperties that are tried, each within the bounds of a trial.
MAX_PATTERNS = 32
#: The characters of a schema's value that a message or a log shows.
_SHOWN_LENGTH = 40


class Probe(NamedTuple):
    """A schema that has to allow the beginning of an answer."""

    schema: Mapping[str, Any]
    beginning: str
    #: The refusal where it does not.
    reason: str


def exact(schema: Mapping[str, Any]) -> tuple[dict[str, Any], frozenset[str]]:
    """Makes a copy with the formats that the library knows, and a set of the other formats. Raises Refused."""
    own: dict[str, Any] = json.loads(json.dumps(schema))
    unknown: set[str] = set()
    for each in _subschemas(own):
        for keyword in _BOUNDS:
            if not _is_exact_bound(keyword, each.get(keyword), of=each.get("type")):
                raise _refused(
                    f"{keyword} {_shown(each[keyword])} is no number that is kept to exactly; take one within 2^53"
                )
        if (opened := _open_bound(each)) is not None:
            raise _refused(
                f"{opened} {_shown(each[opened])} would be allowed itself beside a bound so near; move one a little"
            )
        for keyword in ("const", "enum"):
            if (number := next(filter(_is_inexact, _leaves(each.get(keyword))), None)) is not None:
                raise _refused(
                    f"{keyword} has {_shown(number)}, which cannot be written exactly; take a number within 2^53"
                )
        name = each.get("format")
        if isinstance(name, str) and not _is_known_format(name):
            unknown.add(_shown(each.pop("format")))
    return own, frozenset(unknown)


def probes(schema: Mapping[str, Any]) -> list[Probe]:
    """Makes probes that patternProperties match a name that properties does not have. Raises Refused."""
    every = list(_subschemas(schema))
    names = sorted({name for each in every for name in _names(each, "properties")})
    # The library decides about a match: an expression could keep Python's own engine at it for ever.
    patterns = {tuple(_names(each, "patternProperties")) for each in every} - {()} if names else set()
    if len(patterns) > MAX_PATTERNS:
        raise _refused(f"patternProperties stands in more than {MAX_PATTERNS} places")
    return [_probe(names, each) for each in sorted(patterns)]


def _probe(names: Sequence[str], patterns: Sequence[str]) -> Probe:
    whole = {
        "type": "object",
        "properties": {name: {"const": 0} for name in names},
        "required": names,
        "patternProperties": {pattern: {} for pattern in patterns},
        "additionalProperties": False,
    }
    shown = repr(_shown(patterns[0]))
    return Probe(
        whole,
        "{" + "".join(f"{json.dumps(name)}:0," for name in names) + '"',
        f"patternProperties {shown} matches no name that properties has not; put its schema there",
    )


def _subschemas(schema: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields every schema within this one, itself first. Other keys are searched too: a $ref may name them."""
    open_: list[Any] = [schema]
    while open_:
        each = open_.pop()
        if isinstance(each, list):
            open_ += each
        elif isinstance(each, dict):
            yield each
            for keyword, value in each.items():
                if keyword in _BY_NAME and isinstance(value, dict):
                    open_ += value.values()
                elif keyword not in _DATA:
                    open_.append(value)


def _leaves(value: Any) -> Iterator[Any]:
    open_ = [value]
    while open_:
        each = open_.pop()
        if isinstance(each, list | dict):
            open_ += each.values() if isinstance(each, dict) else each
        else:
            yield each


def _names(schema: Mapping[str, Any], keyword: str) -> list[str]:
    named = schema.get(keyword)
    return list(named) if isinstance(named, dict) else []


def _is_exact_bound(keyword: str, value: Any, *, of: Any) -> bool:
    if not _is_number(value):
        return True
    if of != "integer" or keyword not in ("minimum", "maximum") or isinstance(value, float):
        return abs(value) < 2**53  # of others fewer digits are written, or the next number is counted
    # The largest int64 is no float, and what the library takes for it is that number again.
    return (keyword == "maximum" and value == _MAX_INT64) or not _is_inexact(value)


def _open_bound(schema: Mapping[str, Any]) -> str | None:
    """Finds an exclusive bound that the library lets through: a whole number, less than 1 from a bound that is none."""
    for mine, others in _FACING.items():
        if _is_number(schema.get(mine)) and schema[mine] == int(schema[mine]):
            near = [schema[each] for each in others if _is_number(schema.get(each))]
            if any(abs(each - schema[mine]) < 1 and each != int(each) for each in near):
                return mine
    return None


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_inexact(value: Any) -> bool:
    """True for an integer that becomes another one as a float, or that the library cannot write."""
    if isinstance(value, bool) or not isinstance(value, int):
        return False
    return abs(value) > _MAX_INT64 or int(float(value)) != value


@lru_cache(maxsize=1_024)
def _is_known_format(name: str) -> bool:
    grammar = LLMatcher.grammar_from_json_schema({"type": "string", "format": name})
    message: str = LLMatcher.validate_grammar(grammar)
    return "Unknown format" not in message


def _shown(value: object) -> str:
    return str(value)[:_SHOWN_LENGTH]


def _refused(reason: str) -> Refused:
    return Refused(ErrorCode.INVALID_RESPONSE_FORMAT, f"response_format was refused: {reason}")
