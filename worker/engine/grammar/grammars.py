"""Structured output: the tokens that a response_format lets come next, as bits over a vocabulary.

Owns llguidance: its vocabulary of a tokenizer, its grammars, their limits and its errors, which become Refused here.
It knows no batch, no device and no sampling: a Matcher follows one sequence, and `fill` writes rows of bits that the
engine lays over its logits.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

import torch
from llguidance import LLExecutor, LLMatcher, LLTokenizer
from transformers import PreTrainedTokenizerBase

from batchmill.jobs.requests.request import ErrorCode
from batchmill.worker.engine.grammar.response_format import grammar_text
from batchmill.worker.engine.grammar.schema import probes
from batchmill.worker.engine.grammar.trial import NOT_ALLOWED, Trial, compiled
from batchmill.worker.engine.refused import Refused

#: Grammars that are kept compiled, with the refusals of those that cannot be.
KEPT_GRAMMARS = 16
#: Threads that fill rows: half of the cores, since the other work of a step goes on meanwhile, up to this many.
MAX_THREADS = 8
#: A reason in the library's words is kept up to this length.
REASON_LENGTH = 200
_WORD_BITS = 32
#: The library's name for the end token of a model that has none.
_NO_END = "<|no end|>"
#: Messages of the library about its own parts and options, and the messages in their place.
_OUR_WORDS = {
    "coerce_one_of": "oneOf: several of its schemas may match the same value; use anyOf, or tell them apart by type "
    "or by a required property with another const in each",
    "NoExtension": "nothing that it allows can follow",
    "Regex is empty": "no string matches its pattern, format, enum and lengths together",
    "Failed to generate regex for": "no number that can be written is within its minimum, maximum and multipleOf",
}
_T = TypeVar("_T")


class Grammars:
    """The grammars of one model's requests.

    The tokenizer is compiled on the first call of `matcher`, which takes a second or two for 128,000 tokens. One thread
    at a time may use a Grammars.

    `vocabulary`: the number of tokens that the model has embeddings for, which may be more or fewer than the tokenizer
    has.
    `end_token_ids`: the tokens that are allowed where a grammar may end, and nowhere else. No other special token is
    ever allowed.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, vocabulary: int, end_token_ids: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._size = vocabulary
        self._end_token_ids = end_token_ids
        self._trial = Trial()
        self._vocabulary: _Vocabulary | Refused | None = None
        self._kept: OrderedDict[str, _Grammar | Refused] = OrderedDict()

    def matcher(self, response_format: Mapping[str, Any]) -> Matcher:
        """Makes a matcher at the start of this response_format's grammar.

        Raises Refused: invalid_response_format where it is none or too much for its limits, unsupported_option where
        the tokenizer cannot be constrained at all.
        """
        if self._vocabulary is None:
            self._vocabulary = _attempt(lambda: _Vocabulary(self._tokenizer, self._size, self._end_token_ids))
        vocabulary = _given(self._vocabulary)
        key = _key(response_format)
        grammar = self._kept.pop(key, None)
        if grammar is None or (isinstance(grammar, _Grammar) and grammar.spoiled):
            grammar = _attempt(lambda: _Grammar(vocabulary, response_format, self._trial))
        self._kept[key] = grammar
        if len(self._kept) > KEPT_GRAMMARS:
            self._kept.popitem(last=False)
        return Matcher(_given(grammar))


class Matcher:
    """The state of one sequence in its grammar. Neither this nor `fill` may run while the other does."""

    __slots__ = ("_ended", "_failure", "_grammar", "_inner")

    def __init__(self, grammar: _Grammar) -> None:
        self._grammar = grammar
        self._inner = grammar.start.deep_copy()
        self._ended = False
        self._failure: str | None = None

    def advance(self, token: int) -> None:
        """Takes the token that was chosen among those allowed."""
        if token in self._grammar.vocabulary.end_token_ids:
            self._ended = True
            return
        self._inner.consume_token(token)
        self._look()

    @property
    def ended(self) -> bool:
        """True where nothing but an end token may follow, or one was taken. It may become true in `fill` too."""
        return self._ended

    @property
    def failure(self) -> str | None:
        """The reason in one line why the answer cannot be completed, once that is known; `ended` is true then."""
        return self._failure

    def _look(self) -> None:
        if not self._inner.is_stopped():
            return
        self._ended = True
        if self._inner.is_error():
            self._fail(_reason(self._inner.get_error()))

    def _fail(self, reason: str) -> None:
        self._ended = True
        self._failure = f"response_format: the grammar ran into a limit or a dead end: {reason}"
        # The limit may have filled up over many sequences, whose states are shared: the next starts afresh.
        self._grammar.spoiled = True


def fill(matchers: Sequence[tuple[int, Matcher]], allowed: torch.Tensor) -> None:
    """Writes the tokens that may follow each matcher's sequence into its row, and leaves the other rows alone.

    `allowed`: (rows, vocabulary / 32 rounded up) int32 on the CPU, contiguous; bit i of word w stands for token
    32 w + i, and every bit is set in a row that is free. The work is done without holding the GIL, on threads of its
    own. A row whose matcher has ended allows the end tokens alone, or everything where the model has none. All
    matchers are of one Grammars, none twice.
    """
    if not matchers:
        return
    vocabulary = matchers[0][1]._grammar.vocabulary
    assert allowed.shape[1] == vocabulary.words
    assert allowed.dtype == torch.int32
    assert allowed.is_contiguous()
    if vocabulary.known is None:
        vocabulary.compute([(each._inner, row) for row, each in matchers], allowed)
    else:
        wide = torch.empty((len(matchers), vocabulary.library_words), dtype=torch.int32)
        vocabulary.compute([(each._inner, place) for place, (_, each) in enumerate(matchers)], wide)
        rows = torch.tensor([row for row, _ in matchers])
        allowed[rows] = wide[:, : vocabulary.words] & vocabulary.known
    for row, matcher in matchers:
        matcher._look()
        if vocabulary.known is not None and not matcher.ended and not allowed[row].any():
            matcher._fail("the model has no embedding for what must follow")
        if matcher.ended:
            allowed[row] = vocabulary.end_bits


class _Vocabulary:
    """One tokenizer as llguidance knows it, with the sizes that it and the model disagree about.

    `known`: the bits of the tokens that the model has, None where no other is ever set.
    `end_bits`: the bits of the tokens that an ended row allows.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, size: int, end_token_ids: Collection[int]) -> None:
        tokens = max(tokenizer.get_vocab().values(), default=-1) + 1
        self.end_token_ids = frozenset(each for each in end_token_ids if each < min(size, tokens))
        # The library must have an end token: where there is none, it is one that only the library knows.
        ends = self.end_token_ids or {tokens}
        library_size = max(size, tokens, max(ends) + 1)
        self.library = LLTokenizer(_description(tokenizer, ends), n_vocab=library_size, eos_token=sorted(ends))
        self.words = -(-size // _WORD_BITS)
        self.library_words = -(-library_size // _WORD_BITS)
        known = set(range(size)).difference(ends - self.end_token_ids)
        self.known = None if len(known) == library_size else _bits(known, self.words)
        self.end_bits = _bits(self.end_token_ids or range(self.words * _WORD_BITS), self.words)
        self._executor = LLExecutor(max(1, min(MAX_THREADS, torch.get_num_threads() // 2)))

    def compute(self, matchers: list[tuple[LLMatcher, int]], bits: torch.Tensor) -> None:
        """Writes the row of each matcher; `bits`: (rows, library_words) int32."""
        self._executor.unsafe_compute_mask_ptr(matchers, bits.data_ptr(), bits.shape[1] * 4, bits.shape[0])


class _Grammar:
    """One compiled grammar. Its sequences are copies of `start` and share what its lexer learns.

    Raises Refused. `spoiled`: one of its sequences failed.
    """

    def __init__(self, vocabulary: _Vocabulary, response_format: Mapping[str, Any], trial: Trial) -> None:
        text = grammar_text(response_format)
        if reason := trial.reason_against(text):
            raise _refused(_reason(reason))
        for probe in probes(response_format.get("schema") or {}):
            probed = grammar_text({"type": "json_schema", "schema": probe.schema})
            if reason := trial.reason_against(probed, probe.beginning):
                raise _refused(probe.reason if reason == NOT_ALLOWED else reason)
        self.vocabulary = vocabulary
        self.spoiled = False
        self.start = compiled(vocabulary.library, text)
        if self.start.is_error():
            raise _refused(_reason(self.start.get_error()))


def _description(tokenizer: PreTrainedTokenizerBase, ends: Collection[int]) -> str:
    """Writes a tokenizer's tokenizer.json, with every special and end token marked as special. Raises Refused."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise Refused(
            ErrorCode.UNSUPPORTED_OPTION,
            "response_format needs a tokenizer with a tokenizer.json, and the model has none",
        )
    description = json.loads(backend.to_str()) | {"truncation": None, "padding": None}
    added = {each["id"]: each for each in description.get("added_tokens") or ()}
    marked = {number for number, each in tokenizer.added_tokens_decoder.items() if each.special}
    for number in sorted(marked.union(tokenizer.all_special_ids, ends)):
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        token = added.get(number) or {
            "id": number,
            "content": tokenizer.convert_ids_to_tokens(number) or _NO_END,
            **plain,
        }
        added[number] = token | {"special": True}
    return json.dumps(description | {"added_tokens": [added[number] for number in sorted(added)]})


def _attempt(made: Callable[[], _T]) -> _T | Refused:
    """Returns the made value, or its refusal, so that either can be kept."""
    try:
        return made()
    except Refused as error:
        return error
    except ValueError as error:
        # Only the library raises it, about a tokenizer whose decoder it does not know.
        return Refused(
            ErrorCode.UNSUPPORTED_OPTION,
            f"response_format does not work with the model's tokenizer: {_reason(str(error))}",
        )


def _given(kept: _T | Refused) -> _T:
    if isinstance(kept, Refused):
        raise Refused(kept.code, str(kept))
    return kept


def _refused(reason: str) -> Refused:
    return Refused(ErrorCode.INVALID_RESPONSE_FORMAT, f"response_format was refused: {reason}")


def _key(response_format: Mapping[str, Any]) -> str:
    try:
        return json.dumps(response_format)
    except RecursionError:
        raise _refused("its schema is nested too deeply") from None


def _reason(message: str) -> str:
    """The reason in words that help a user: the library's own line, or ours in its place."""
    for words, ours in _OUR_WORDS.items():
        if words in message:
            return ours
    lines = [each.strip() for each in message.splitlines() if each.strip() not in ("", "<non-verbose/>")]
    why = next((each.removeprefix("error: ") for each in lines if each.startswith("error: ")), None)
    return (why or (lines[0] if lines else "no reason given").rpartition("(in regex): ")[2])[:REASON_LENGTH]


def _bits(tokens: Collection[int], words: int) -> torch.Tensor:
    """(words,) int32 with the bits of these tokens."""
    flags = torch.zeros(words * _WORD_BITS, dtype=torch.int64)
    flags[torch.tensor(list(tokens), dtype=torch.int64)] = 1
    values = (flags.view(words, _WORD_BITS) << torch.arange(_WORD_BITS)).sum(1)
    return values.to(torch.int32)
