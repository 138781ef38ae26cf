"""Grammars of response_format: random answers within each grammar are valid by its definition."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from structlog.testing import capture_logs
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from batchmill.jobs.models.spec import DEMO_FOLDER
from batchmill.jobs.requests.request import ErrorCode
from batchmill.worker.engine.grammar.grammars import Grammars, Matcher, fill
from batchmill.worker.engine.grammar.response_format import MAX_TEXT_LENGTH
from batchmill.worker.engine.refused import Refused
from tests.support.models.tiny import SPECIAL_TOKENS, build_tokenizer

END, OTHER_END = SPECIAL_TOKENS.index("</s>"), SPECIAL_TOKENS.index("<|end|>")
BYTES = len(SPECIAL_TOKENS) + 256
WALK_TOKENS = 3_000
#: Seconds that a hostile grammar may take, on a machine with much else to do.
PATIENCE_SECONDS = 30.0


def closed(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


SCHEMAS: dict[str, dict[str, Any]] = {
    "nested": closed(a=closed(b=closed(c={"type": "array", "items": {"type": "boolean"}, "maxItems": 3}))),
    "array": {
        "type": "array",
        "items": closed(x={"type": "boolean"}, y={"type": "null"}),
        "minItems": 2,
        "maxItems": 4,
    },
    "enum": closed(color={"enum": ["red", "blue", 3, None, {"a": [1]}]}, fixed={"const": 'Ünï "q" \\ 日本'}),
    "integers": closed(i={"type": "integer", "minimum": -7, "maximum": 1234}),
    "numbers": closed(f={"type": "number", "exclusiveMinimum": 0.5, "maximum": 99.25, "multipleOf": 0.25}),
    "pattern": closed(zip={"type": "string", "pattern": "^[0-9]{5}(-[0-9]{4})?$"}),
    "formats": closed(day={"type": "string", "format": "date"}, id={"type": "string", "format": "uuid"}),
    "lengths": closed(s={"type": "string", "minLength": 3, "maxLength": 6}),
    "reference": {
        "$defs": {"node": closed(v={"enum": [1, 2]}, next={"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]})},
        "$ref": "#/$defs/node",
    },
    "optional": {
        "type": "object",
        "properties": {"a": {"type": "null"}, "b": {"const": 1}},
        "additionalProperties": False,
    },
    "map": {
        "type": "object",
        "properties": {"id": {"enum": [1, 2]}},
        "required": ["id"],
        "additionalProperties": {"type": "array", "items": {"enum": [1, 2, 3]}, "maxItems": 3},
        "maxProperties": 4,
    },
    "anyOf": closed(
        p={"anyOf": [{"type": "string", "maxLength": 5}, {"type": "boolean"}]}, q={"type": ["null", "boolean"]}
    ),
    "oneOf": {
        "oneOf": [closed(kind={"const": "circle"}, r={"enum": [1]}), closed(kind={"const": "box"}, w={"enum": [2]})]
    },
    "allOf": {"allOf": [closed(a={"type": "integer", "minimum": 3}), {"properties": {"a": {"maximum": 7}}}]},
    "prefixItems": {
        "type": "array",
        "prefixItems": [{"const": "x"}, {"type": "boolean"}],
        "items": False,
        "minItems": 2,
    },
    "patternProperties beside properties": {
        "type": "object",
        "properties": {"ab": {"type": "integer"}, "n": {"type": "null"}},
        "required": ["ab"],
        "patternProperties": {"^a": {"type": "integer", "minimum": 3, "maximum": 7}},
        "additionalProperties": False,
    },
    "large integers": closed(
        low={"type": "integer", "minimum": 2**53 + 2, "maximum": 2**53 + 6},
        high={"type": "integer", "minimum": 2**63 - 1024, "maximum": 2**63 - 1},
        const={"const": 2**60 + 1024},
    ),
    "patternProperties": {
        "type": "object",
        "patternProperties": {"^x_[a-z]{1,3}$": {"type": "boolean"}},
        "additionalProperties": False,
        "minProperties": 1,
        "maxProperties": 3,
    },
}


def demo_tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(str(DEMO_FOLDER))


def merged_tokenizer() -> PreTrainedTokenizerBase:
    """Byte pairs merged over JSON, so that a token spans borders of the grammar."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    text = [json.dumps(each, indent=indent) for each in SCHEMAS.values() for indent in (None, 2, 4)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1_500, special_tokens=[*SPECIAL_TOKENS], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def sentence_piece_tokenizer() -> PreTrainedTokenizerBase:
    """Spaces as `▁`, and bytes as `<0x..>` where no piece has the character."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *'▁abcdefghijklmnopqrstuvwxyz{}":,[']
    model = models.BPE(
        {piece: number for number, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True
    )
    backend = Tokenizer(model)
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "bytes": build_tokenizer,
    "demo": demo_tokenizer,
    "merged": merged_tokenizer,
    "pieces": sentence_piece_tokenizer,
}


class Desk:
    """One tokenizer with its grammars."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, vocabulary: int | None = None) -> None:
        self.tokenizer = tokenizer
        self.vocabulary = vocabulary or len(tokenizer)
        self.ends = [tokenizer.eos_token_id]
        self.grammars = Grammars(tokenizer, vocabulary=self.vocabulary, end_token_ids=self.ends)

    def matcher(self, **response_format: Any) -> Matcher:
        return self.grammars.matcher(response_format)

    def allowed(self, matcher: Matcher) -> list[int]:
        return bits(filled([(0, matcher)], 1, self.vocabulary)[0], self.vocabulary)

    def text(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def walk(self, matcher: Matcher, source: random.Random) -> str | None:
        """A random answer, None where it has not ended after WALK_TOKENS."""
        tokens: list[int] = []
        while not matcher.ended and len(tokens) < WALK_TOKENS:
            allowed = self.allowed(matcher)
            if (end := self.ends[0]) in allowed and (len(allowed) == 1 or source.random() < 0.3):
                matcher.advance(end)
                break
            # Quotes and brackets end what would go on for ever.
            closing = [each for each in allowed if self.text([each]).strip()[:1] in ('"', "}", "]")]
            pool = closing if closing and source.random() < 0.2 else [each for each in allowed if each != end]
            tokens.append(source.choice(pool))
            matcher.advance(tokens[-1])
        assert matcher.failure is None
        return self.text(tokens) if matcher.ended else None

    def takes(self, matcher: Matcher, text: str) -> bool:
        """Returns True where this text, byte by byte, is a whole answer."""
        for byte in text.encode():
            token = self.tokenizer.convert_tokens_to_ids(BYTE_TOKENS[byte])
            if matcher.ended or token not in self.allowed(matcher):
                return False
            matcher.advance(token)
        return matcher.ended or self.ends[0] in self.allowed(matcher)


def filled(matchers: Sequence[tuple[int, Matcher]], rows: int, vocabulary: int) -> torch.Tensor:
    allowed = torch.full((rows, -(-vocabulary // 32)), -1, dtype=torch.int32)
    fill(matchers, allowed)
    return allowed


def bits(row: torch.Tensor, vocabulary: int) -> list[int]:
    flags = (row[:, None] >> torch.arange(32, dtype=torch.int32)) & 1
    return flags.flatten()[:vocabulary].nonzero().flatten().tolist()


def byte_tokens() -> list[str]:
    """The byte-level token of every byte: printable ones stand for themselves, the others from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


BYTE_TOKENS = byte_tokens()
BYTE_DESK = Desk(build_tokenizer())


@pytest.fixture(scope="module")
def desks() -> dict[str, Desk]:
    return {name: Desk(build()) for name, build in TOKENIZERS.items()}


@pytest.fixture(scope="module")
def desk(desks: dict[str, Desk]) -> Desk:
    return desks["bytes"]


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


def test_rows_without_a_matcher_are_left_alone(desk: Desk) -> None:
    allowed = torch.arange(5 * 9, dtype=torch.int32).view(5, 9)
    before = allowed.clone()
    fill([(3, desk.matcher(type="choice", choice=["a"])), (1, desk.matcher(type="json_object"))], allowed)
    assert torch.equal(allowed[[0, 2, 4]], before[[0, 2, 4]])
    assert desk.text(bits(allowed[3], desk.vocabulary)) == "a"
    assert desk.text(bits(allowed[1], desk.vocabulary)) == "{"


def test_no_matchers_write_nothing() -> None:
    fill([], torch.zeros((2, 1), dtype=torch.int32))


def test_two_sequences_of_one_grammar_do_not_disturb_each_other(desk: Desk) -> None:
    first, second = (desk.matcher(type="choice", choice=["ab", "cd"]) for _ in range(2))
    desk.allowed(first)
    first.advance(desk.tokenizer.convert_tokens_to_ids("a"))
    allowed = filled([(0, first), (1, second)], 2, desk.vocabulary)
    assert desk.text(bits(allowed[0], desk.vocabulary)) == "b"
    assert sorted(desk.text(bits(allowed[1], desk.vocabulary))) == ["a", "c"]


def test_many_rows_at_once_get_what_each_would_get_alone(desks: dict[str, Desk]) -> None:
    desk, source = desks["merged"], random.Random(3)
    formats = [{"type": "json_schema", "schema": each} for each in SCHEMAS.values()] * 3
    together, alone = ([desk.grammars.matcher(each) for each in formats] for _ in range(2))
    for _ in range(25):
        allowed = filled(list(enumerate(together)), len(formats), desk.vocabulary)
        for row, (mine, other) in enumerate(zip(together, alone, strict=True)):
            assert torch.equal(allowed[row], filled([(0, other)], 1, desk.vocabulary)[0])
            if not mine.ended:
                token = source.choice(bits(allowed[row], desk.vocabulary))
                mine.advance(token)
                other.advance(token)


def test_a_character_may_be_written_in_parts(desk: Desk) -> None:
    matcher, parts = desk.matcher(type="choice", choice=["é", "è"]), []
    for _ in range(2):
        allowed = desk.allowed(matcher)
        parts.append(len(allowed))
        matcher.advance(allowed[0])
    assert parts == [1, 2]
    assert matcher.ended


def test_the_end_is_known_as_soon_as_nothing_may_follow(desk: Desk) -> None:
    matcher = desk.matcher(type="choice", choice=["a", "ab"])
    matcher.advance(desk.tokenizer.convert_tokens_to_ids("a"))
    assert not matcher.ended
    assert desk.allowed(matcher) == sorted([END, desk.tokenizer.convert_tokens_to_ids("b")])
    matcher.advance(desk.tokenizer.convert_tokens_to_ids("b"))
    assert matcher.ended
    assert matcher.failure is None
    assert desk.allowed(matcher) == [END]


def test_an_end_token_ends(desk: Desk) -> None:
    matcher = desk.matcher(type="regex", regex="a*")
    matcher.advance(END)
    assert matcher.ended
    assert matcher.failure is None


def test_every_end_token_is_allowed_and_no_other_special_token_is() -> None:
    grammars = Grammars(build_tokenizer(), vocabulary=BYTES, end_token_ids=[END, OTHER_END])
    row = filled([(0, grammars.matcher({"type": "regex", "regex": "(?s).*"}))], 1, BYTES)[0]
    assert [each for each in bits(row, BYTES) if each < len(SPECIAL_TOKENS)] == [END, OTHER_END]


def test_an_end_token_that_is_a_word_of_the_vocabulary_is_no_text() -> None:
    tokenizer = build_tokenizer()
    end = tokenizer.convert_tokens_to_ids("a")
    grammars = Grammars(tokenizer, vocabulary=BYTES, end_token_ids=[end])
    row = filled([(0, grammars.matcher({"type": "regex", "regex": "a+b"}))], 1, BYTES)[0]
    assert bits(row, BYTES) == [end]


def test_tokens_without_an_embedding_are_never_allowed() -> None:
    whole, short = (Grammars(build_tokenizer(), vocabulary=each, end_token_ids=[END]) for each in (BYTES, 150))
    asked = {"type": "regex", "regex": "(?s).*"}
    every = bits(filled([(0, whole.matcher(asked))], 1, BYTES)[0], BYTES)
    row = filled([(0, short.matcher(asked))], 1, 150)[0]
    assert bits(row, 160) == [each for each in every if each < 150]


def test_a_vocabulary_larger_than_the_tokenizer_allows_nothing_more() -> None:
    wide = Grammars(build_tokenizer(), vocabulary=1_000, end_token_ids=[END])
    row = filled([(0, wide.matcher({"type": "regex", "regex": "(?s).*"}))], 1, 1_000)[0]
    assert max(bits(row, 1_024)) < BYTES


def test_what_only_tokens_without_an_embedding_could_continue_has_failed() -> None:
    short = Grammars(build_tokenizer(), vocabulary=40, end_token_ids=[END])
    matcher = short.matcher({"type": "choice", "choice": ["z"]})
    assert bits(filled([(0, matcher)], 1, 40)[0], 40) == [END]
    assert matcher.ended
    assert matcher.failure is not None
    assert "no embedding" in matcher.failure


def test_a_model_without_an_end_token_ends_with_the_grammar() -> None:
    tokenizer = build_tokenizer()
    grammars = Grammars(tokenizer, vocabulary=BYTES, end_token_ids=[])
    matcher = grammars.matcher({"type": "choice", "choice": ["a"]})
    row = filled([(0, matcher)], 1, BYTES)[0]
    assert tokenizer.decode(bits(row, BYTES)) == "a"
    matcher.advance(tokenizer.convert_tokens_to_ids("a"))
    assert matcher.ended
    assert bits(filled([(0, matcher)], 1, BYTES)[0], BYTES) == [*range(BYTES)]


def test_a_grammar_that_runs_into_its_limits_fails_and_says_so(desk: Desk) -> None:
    matcher, source = desk.matcher(type="regex", regex="(((a{1,1000}){1,1000}){1,1000}){1,1000}"), random.Random(0)
    for _ in range(WALK_TOKENS):
        allowed = desk.allowed(matcher)
        if matcher.ended:
            break
        matcher.advance(source.choice([each for each in allowed if each != END]))
    assert matcher.failure is not None
    assert "\n" not in matcher.failure
    assert desk.allowed(matcher) == [END]
    assert desk.allowed(desk.matcher(type="regex", regex="(((a{1,1000}){1,1000}){1,1000}){1,1000}"))


def schema(value: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "schema": value}


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


def test_an_end_token_that_the_tokenizer_lacks_is_no_hindrance() -> None:
    grammars = Grammars(build_tokenizer(), vocabulary=BYTES + 40, end_token_ids=[BYTES + 7, END])
    row = filled([(0, grammars.matcher({"type": "choice", "choice": [""]}))], 1, BYTES + 40)[0]
    assert bits(row, BYTES + 40) == [END]


def test_a_tokenizer_that_cannot_be_constrained_is_said_to_be_so() -> None:
    backend = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    grammars = Grammars(
        PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"), vocabulary=2, end_token_ids=[1]
    )
    with pytest.raises(Refused, match="tokenizer") as refusal:
        grammars.matcher({"type": "json_object"})
    assert refusal.value.code == ErrorCode.UNSUPPORTED_OPTION
