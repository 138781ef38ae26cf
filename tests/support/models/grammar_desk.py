"""A tokenizer with its grammars: random answers within a grammar, and texts that it takes or refuses."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from batchmill.jobs.models.spec import DEMO_FOLDER
from batchmill.worker.engine.grammar.grammars import Grammars, Matcher, fill
from tests.support.models.tiny import SPECIAL_TOKENS, build_tokenizer

END, OTHER_END = SPECIAL_TOKENS.index("</s>"), SPECIAL_TOKENS.index("<|end|>")
BYTES = len(SPECIAL_TOKENS) + 256
WALK_TOKENS = 3_000


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


def schema(value: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "schema": value}
