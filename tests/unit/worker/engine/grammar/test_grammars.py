"""Grammars of response_format: random answers within each grammar are valid by its definition."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from structlog.testing import capture_logs

from tests.support.models.grammar_desk import BYTE_DESK, BYTE_TOKENS, SCHEMAS, TOKENIZERS, Desk, closed


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("name", SCHEMAS)
def test_random_answers_within_a_schema_are_valid(desks: dict[str, Desk], tokenizer: str, name: str) -> None:
    desk, validator, source = desks[tokenizer], Draft202012Validator(SCHEMAS[name]), random.Random(name)
    for _ in range(4):
        answer = desk.walk(desk.matcher(type="json_schema", schema=SCHEMAS[name]), source)
        assert answer is not None
        validator.validate(json.loads(answer))


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_random_answers_within_json_object_are_objects(desks: dict[str, Desk], tokenizer: str) -> None:
    desk, source = desks[tokenizer], random.Random(1)
    answers = [desk.walk(desk.matcher(type="json_object"), source) for _ in range(8)]
    ended = [json.loads(answer) for answer in answers if answer is not None]
    assert len(ended) >= 4
    assert all(isinstance(each, dict) for each in ended)


REGEXES = [
    r"[a-z]{2,5}@[a-z]+\.(com|org)",
    r"(\+49 )?[0-9]{3}-[0-9]{4}",
    r"^(yes|no|maybe)$",
    r"a/b|\"c\"|é+",
    r"(?i)hello [A-C]*",
    r"",
]


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("regex", REGEXES)
def test_random_answers_within_a_regex_match_it(desks: dict[str, Desk], tokenizer: str, regex: str) -> None:
    desk, source = desks[tokenizer], random.Random(regex)
    for _ in range(4):
        answer = desk.walk(desk.matcher(type="regex", regex=regex), source)
        assert answer is not None
        assert re.fullmatch(regex, answer)


CHOICES = ["yes", "yesterday", "no", "", " space", 'q"uo\\te', "line\nbreak", "日本", "😀", "a/b", "日"]


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_random_answers_within_a_choice_are_each_of_them(desks: dict[str, Desk], tokenizer: str) -> None:
    desk, source = desks[tokenizer], random.Random(2)
    answers = {desk.walk(desk.matcher(type="choice", choice=CHOICES), source) for _ in range(600)}
    assert answers == set(CHOICES)


@given(choices=st.lists(st.text(max_size=8), min_size=1, max_size=6), other=st.text(max_size=8))
@settings(max_examples=60)
def test_a_choice_takes_its_own_strings_and_no_other(choices: list[str], other: str) -> None:
    desk = BYTE_DESK
    assert all(desk.takes(desk.matcher(type="choice", choice=choices), each) for each in choices)
    assert desk.takes(desk.matcher(type="choice", choice=choices), other) == (other in choices)


PLAIN = st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S"]), min_size=1, max_size=5)
PIECES = st.one_of(PLAIN.map(re.escape), st.sampled_from([r"[a-c]", r"[^\n]", "(ab|cd)", "(x|)", r"[0-9]{2}"]))
REGEX = st.lists(st.tuples(PIECES, st.sampled_from(["", "", "?", "{0,2}"])), max_size=4)


@given(parts=REGEX, seed=st.integers(0, 1_000))
@settings(max_examples=60)
def test_whatever_a_regex_allows_python_matches_too(parts: list[tuple[str, str]], seed: int) -> None:
    regex = "".join(f"(?:{piece}){times}" for piece, times in parts)
    answer = BYTE_DESK.walk(BYTE_DESK.matcher(type="regex", regex=regex), random.Random(seed))
    assert answer is not None
    assert re.fullmatch(regex, answer)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text('ab"\\\n é😀', max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab é", max_size=4), inner, max_size=3),
    max_leaves=8,
)


@given(value=st.dictionaries(st.text("ab é", max_size=4), JSON, max_size=4), indent=st.sampled_from([None, 2, 4, "\t"]))
@settings(max_examples=40)
def test_json_object_takes_every_object_in_the_usual_layouts(value: dict[str, Any], indent: Any) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    assert BYTE_DESK.takes(BYTE_DESK.matcher(type="json_object"), text)


def test_an_unknown_format_is_a_note_and_what_is_no_format_stays(desk: Desk) -> None:
    named = closed(format={"type": "string", "format": "int99"}, kind={"const": {"format": "ipv7"}})
    with capture_logs() as logs:
        for _ in range(2):
            matcher = desk.matcher(type="json_schema", schema=named)
    assert logs == [{"event": "formats of a schema are not checked", "formats": ["int99"], "log_level": "info"}]
    assert desk.takes(matcher, '{"format":"any","kind":{"format":"ipv7"}}')
    date = desk.matcher(type="json_schema", schema=closed(day={"type": "string", "format": "date"}))
    assert not desk.takes(date, '{"day":"any"}'), "a format that is known is kept to"


def test_white_space_cannot_go_on_for_ever(desk: Desk) -> None:
    for white in " \t\n":
        token, count = desk.tokenizer.convert_tokens_to_ids(BYTE_TOKENS[ord(white)]), 0
        run = desk.matcher(type="json_object")
        run.advance(desk.tokenizer.convert_tokens_to_ids("{"))
        while token in desk.allowed(run) and count < 100:
            run.advance(token)
            count += 1
        assert count <= 2
