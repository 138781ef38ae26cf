"""Formats that cannot be taken: each is refused in one line that names the reason."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from batchmill.jobs.requests.request import ErrorCode
from batchmill.worker.engine.grammar.response_format import MAX_TEXT_LENGTH
from batchmill.worker.engine.refused import Refused
from tests.support.models.grammar_desk import Desk, closed, schema

BAD: dict[str, tuple[Mapping[str, Any], str]] = {
    "no type": ({}, "type"),
    "unknown type": ({"type": "xml"}, "type"),
    "no schema": ({"type": "json_schema"}, "not an object"),
    "schema is true": ({"type": "json_schema", "schema": True}, "not an object"),
    "unknown keyword": ({"type": "json_schema", "schema": {"not": {"type": "string"}}}, 'Unimplemented keys: ["not"]'),
    "unknown type in schema": ({"type": "json_schema", "schema": {"type": "strnig"}}, "Invalid type: strnig"),
    "a number that is no float": (
        {"type": "json_schema", "schema": {"type": "integer", "minimum": 2**53 + 1, "maximum": 2**53 + 3}},
        "minimum 9007199254740993 is no number that is kept to exactly",
    ),
    "a bound that is counted from": (
        {"type": "json_schema", "schema": {"items": {"type": "integer", "exclusiveMaximum": 2**53 + 4}}},
        "exclusiveMaximum 9007199254740996",
    ),
    "a bound of numbers": (
        schema({"type": "number", "minimum": 2**54}),
        "minimum 1801439850948",
    ),
    "a bound beyond all": (
        schema({"type": "integer", "minimum": 10**25}),
        "minimum 1000000000",
    ),
    "a bound of integers written as a float": (schema({"type": "integer", "minimum": 1e25}), "minimum 1e+25"),
    "an open bound beside a near one": (
        schema({"type": "number", "exclusiveMinimum": 1, "exclusiveMaximum": 1.001}),
        "exclusiveMinimum 1 would be allowed itself",
    ),
    "an open bound above a near one": (
        schema({"items": {"type": "number", "exclusiveMaximum": -3.0, "minimum": -3.5}}),
        "exclusiveMaximum -3.0 would be allowed itself",
    ),
    "a large float": ({"type": "json_schema", "schema": {"type": "number", "maximum": 1e20}}, "maximum 1e+20"),
    "a constant that is no float": (
        schema({"const": [{"a": 2**53 + 1}]}),
        "const has 900719",
    ),
    "an enum that is no float": ({"type": "json_schema", "schema": {"enum": [1, -(2**63)]}}, "enum has -922337203685"),
    "names taken": (
        {
            "type": "json_schema",
            "schema": closed(a={"type": "integer"}) | {"patternProperties": {"^a$": {"minimum": 1}}},
        },
        "patternProperties '^a$' matches no name that properties has not",
    ),
    "names taken elsewhere": (
        {
            "type": "json_schema",
            "schema": {
                "allOf": [
                    {"type": "object", "properties": {"a": {}, "b": {}}},
                    {"patternProperties": {"^(a|b)$": {"type": "integer"}}, "additionalProperties": False},
                ]
            },
        },
        "patternProperties",
    ),
    "overlapping": (
        {
            "type": "json_schema",
            "schema": {"oneOf": [{"type": "integer", "maximum": 5}, {"type": "integer", "minimum": 3}]},
        },
        "oneOf: several of its schemas may match the same value; use anyOf",
    ),
    "no string": (
        {"type": "json_schema", "schema": {"type": "string", "pattern": "^a{3}$", "maxLength": 2}},
        "no string matches its pattern, format, enum and lengths together",
    ),
    "bad pattern": ({"type": "json_schema", "schema": {"type": "string", "pattern": "(a"}}, "unclosed group"),
    "remote": ({"type": "json_schema", "schema": {"$ref": "https://example.org/s.json"}}, "not present"),
    "nothing": ({"type": "json_schema", "schema": {"type": "integer", "minimum": 5, "maximum": 3}}, "Unsatisfiable"),
    "own reference": ({"type": "json_schema", "schema": {"$ref": "#"}}, "nothing that it allows can follow"),
    "lenient": ({"type": "json_schema", "schema": {"not": {}, "x-guidance": {"lenient": True}}}, "Unimplemented"),
    "surrogate in a schema": ({"type": "json_schema", "schema": {"const": "\ud800"}}, "surrogate"),
    "no regex": ({"type": "regex"}, "not a string"),
    "bad regex": ({"type": "regex", "regex": "(a"}, "unclosed group"),
    "look-ahead": ({"type": "regex", "regex": "(?=a)b"}, "look-around"),
    "word border": ({"type": "regex", "regex": r"\bfoo\b"}, "lookarounds not supported"),
    "back reference": ({"type": "regex", "regex": r"(a)\1"}, "backreferences are not supported"),
    "surrogate in a regex": ({"type": "regex", "regex": "\ud800"}, "surrogate"),
    "regex that matches nothing": ({"type": "regex", "regex": "[a&&b]"}, ""),
    "no choice": ({"type": "choice"}, "list of one or more strings"),
    "empty choice": ({"type": "choice", "choice": []}, "list of one or more strings"),
    "choice of numbers": ({"type": "choice", "choice": ["a", 1]}, "list of one or more strings"),
    "choice is a string": ({"type": "choice", "choice": "ab"}, "list of one or more strings"),
    "surrogate in a choice": ({"type": "choice", "choice": ["\ud800"]}, ""),
    "long regex": ({"type": "regex", "regex": "a" * (MAX_TEXT_LENGTH + 1)}, "at most"),
    "long choice": ({"type": "choice", "choice": ["a" * (MAX_TEXT_LENGTH + 1)]}, "at most"),
    "long schema": ({"type": "json_schema", "schema": {"const": "a" * MAX_TEXT_LENGTH}}, "at most"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_taken_is_refused_in_one_line(desk: Desk, name: str) -> None:
    response_format, words = BAD[name]
    for _ in range(2):
        with pytest.raises(Refused) as refusal:
            desk.grammars.matcher(response_format)
        assert refusal.value.code == ErrorCode.INVALID_RESPONSE_FORMAT
        assert words in str(refusal.value)
        assert "\n" not in str(refusal.value)
        assert len(str(refusal.value)) < 300
        assert not any(each in str(refusal.value) for each in ("coerce", "NoExtension", "Bias", "Regex (", "Some("))
