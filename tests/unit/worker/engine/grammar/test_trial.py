"""Hostile grammars: each is refused or answered in bounded time."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import pytest

from batchmill.worker.engine.refused import Refused
from tests.support.models.grammar_desk import Desk, bits, closed, filled, schema

#: Seconds that a hostile grammar may take, on a machine with much else to do.
PATIENCE_SECONDS = 30.0


def nested(schema: dict[str, Any], times: int) -> dict[str, Any]:
    for _ in range(times):
        schema = {"type": "array", "items": schema}
    return schema


def chain(link: Callable[[str], dict[str, Any]], length: int) -> dict[str, Any]:
    links = {str(each): link(f"#/$defs/{each + 1}") for each in range(length)}
    return {"$defs": links | {str(length): {"type": "integer"}}, "$ref": "#/$defs/0"}


def regex(value: str) -> dict[str, Any]:
    return {"type": "regex", "regex": value}


HOSTILE: dict[str, Callable[[], dict[str, Any]]] = {
    "nested deeply": lambda: schema(nested({}, 50)),
    "nested too deep": lambda: schema(nested({}, 300)),
    "nested beyond Python": lambda: schema(nested({}, 100_000)),
    "references in a row": lambda: schema(chain(lambda to: {"$ref": to}, 1_800)),
    "items in a row": lambda: schema(chain(lambda to: nested({"$ref": to}, 1), 900)),
    "properties in a row": lambda: schema(chain(lambda to: closed(a={"$ref": to}), 600)),
    "branches that double": lambda: schema(chain(lambda to: {"allOf": [{"$ref": to}] * 2}, 40)),
    "choices that double": lambda: schema(chain(lambda to: {"anyOf": [{"$ref": to}] * 2}, 40)),
    "alternatives multiplied": lambda: schema(
        {"allOf": [{"anyOf": [{"properties": {f"p{i}": {"const": j}}} for j in range(4)]} for i in range(12)]}
    ),
    "many properties": lambda: schema({"type": "object", "properties": {str(each): {} for each in range(1_000)}}),
    "too many properties": lambda: schema({"type": "object", "properties": {str(each): {} for each in range(5_000)}}),
    "many name patterns": lambda: schema({"patternProperties": {f"^[a-z]{{{each}}}$": {} for each in range(900)}}),
    "a large multiple": lambda: schema({"type": "integer", "multipleOf": 1_000_003}),
    "a fine multiple": lambda: schema({"type": "number", "multipleOf": 123.456789}),
    "an enormous multiple": lambda: schema({"type": "number", "multipleOf": 1e300}),
    "a name that takes an expression for ever": lambda: schema(
        {"properties": {"a" * 40 + "!": {}}, "patternProperties": {"^(a+)+$": {}}, "additionalProperties": False}
    ),
    "patterns beside names": lambda: schema(
        {"properties": {"x": {}}}
        | {"allOf": [{"patternProperties": {f"^(x|{each}{{900}}y*){{900}}$": {}}} for each in range(40)]}
    ),
    "patterns that all hold": lambda: schema({"allOf": [{"pattern": f".*{each}.{{{each}}}x"} for each in range(200)]}),
    "multiples that multiply": lambda: schema(
        {"allOf": [{"type": "integer", "multipleOf": n} for n in (9_973, 9_967)]}
    ),
    "a large enum": lambda: schema({"enum": [f"v{each}" for each in range(7_000)]}),
    "a long string": lambda: schema({"type": "string", "minLength": 900_000, "maxLength": 1_000_000}),
    "many items": lambda: schema(
        {"type": "array", "minItems": 100_000, "items": {"type": "array", "minItems": 100_000}}
    ),
    "brackets": lambda: regex("(" * 2_000 + "a" + ")" * 2_000),
    "stars": lambda: regex("x*" * 2_000),
    "repeats of repeats": lambda: regex("(((a{1,1000}){1,1000}){1,1000}){1,1000}"),
    "a repeat without end": lambda: regex("a{4294967295}"),
    "an automaton of 2^40 states": lambda: regex("(a|b)*a(a|b){40}"),
    "any character counted": lambda: regex(r"(\w+\s?)*x.{60}"),
    "many choices": lambda: {"type": "choice", "choice": [f"w{each}" for each in range(5_000)]},
    "long choices": lambda: {"type": "choice", "choice": ["ab" * 15_000, "ab" * 15_001]},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_grammar_is_refused_or_answered_in_bounded_time(desks: dict[str, Desk], name: str) -> None:
    desk, source, started = desks["merged"], random.Random(4), time.monotonic()
    try:
        matchers = [desk.grammars.matcher(HOSTILE[name]()) for _ in range(2)]
    except Refused:
        matchers = []
    for _ in range(20):
        allowed = filled(list(enumerate(matchers)), 2, desk.vocabulary)
        for row, matcher in enumerate(matchers):
            if not matcher.ended:
                matcher.advance(source.choice(bits(allowed[row], desk.vocabulary)))
    assert time.monotonic() - started < PATIENCE_SECONDS


def test_a_trial_that_was_lost_is_followed_by_another(desk: Desk) -> None:
    with pytest.raises(Refused, match="simplify it"):
        desk.grammars.matcher(HOSTILE["patterns that all hold"]())
    assert desk.walk(desk.matcher(type="regex", regex="after[12]"), random.Random(5)) in ("after1", "after2")
