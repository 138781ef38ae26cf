"""Tokens that grammars allow: rows of bits, sequences beside one another, end tokens and vocabularies."""

from __future__ import annotations

import random

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from batchmill.jobs.requests.request import ErrorCode
from batchmill.worker.engine.grammar.grammars import Grammars, fill
from batchmill.worker.engine.refused import Refused
from tests.support.models.grammar_desk import BYTES, END, OTHER_END, SCHEMAS, WALK_TOKENS, Desk, bits, filled
from tests.support.models.tiny import SPECIAL_TOKENS, build_tokenizer


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
