"""Decodes tokens into text and bytes: a whole answer, the part that each of its tokens adds, and one token alone.

Owns the ways in which tokenizers hold bytes: those of UTF-8, by ByteLevel's letters or by tokens such as `<0xF0>`, or
else whole characters alone. It knows no request.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Collection, Iterator, Sequence
from itertools import chain
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
#: Tokens before a token that decide how it reads.
CONTEXT_TOKENS = 5
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_BYTES_OF_LETTERS = {letter: byte for byte, letter in bytes_to_unicode().items()}


class Decoding:
    """Decodes the tokens of one tokenizer. Special tokens have no text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._special = {number for number, each in tokenizer.added_tokens_decoder.items() if each.special}
        self._decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
        kinds = set(_kinds(json.loads(self._decoder.__getstate__()))) if self._decoder is not None else set()
        self._has_byte_letters = "ByteLevel" in kinds
        self._has_byte_tokens = "ByteFallback" in kinds
        self._known: dict[int, bytes] = {}
        self._anchor: int | None = None

    def text(self, tokens: Sequence[int], *, after: Sequence[int] = ()) -> str:
        """The text of these tokens after others."""
        before = self._decode(after) if after else ""
        together = self._decode([*after, *tokens])
        return together[len(before) :] if together.startswith(before) else self._decode(tokens)

    def text_with(self, kept: Collection[int], tokens: Sequence[int], *, after: Sequence[int] = ()) -> str:
        """The text of these tokens, with the special tokens `kept` by name."""
        text, begin = "", 0
        for place in [place for place, token in enumerate(tokens) if token in kept]:
            text += self.text(tokens[begin:place], after=after) + (self._piece(tokens[place]) or "")
            begin, after = place + 1, ()
        return text + self.text(tokens[begin:], after=after)

    def parts(self, tokens: Sequence[int], *, after: Sequence[int]) -> list[tuple[str, bytes]]:
        """The part of the text that each of these tokens adds, and its bytes; the parts together are the text.

        A character of several tokens belongs to the last one.
        """
        text = self.text(tokens, after=after)
        known = [self.bytes_of(token) if token not in self._special else b"" for token in tokens]
        if (joined := b"".join(known).decode(errors="replace")) != text and joined == f" {text}":
            # Such a tokenizer leaves out the space that begins a word at the beginning of a text.
            first = next(place for place, each in enumerate(known) if each)
            known[first] = known[first][1:]
            joined = text
        if joined == text:
            return list(zip(_characters(known), known, strict=True))
        contexts = chain(after, tokens)
        return [(part, part.encode()) for part in self._by_contexts(list(contexts), len(after))]

    def bytes_of(self, token: int) -> bytes:
        """The bytes that this token adds after other text; of a special one, its name."""
        known = self._known.get(token)
        if known is None:
            known = self._known[token] = self._bytes_of(token)
        return known

    def _bytes_of(self, token: int) -> bytes:
        piece = self._piece(token)
        if token in self._special or piece is None:
            return (piece or "").encode()
        if self._has_byte_tokens and (byte := _BYTE_TOKEN.fullmatch(piece)):
            return bytes.fromhex(byte[1])
        if self._has_byte_letters:
            letters = [_BYTES_OF_LETTERS.get(letter) for letter in piece]
            # A token with other letters was added to the vocabulary as it reads.
            return piece.encode() if None in letters else bytes(each for each in letters if each is not None)
        return self.text([token], after=self._before()).encode()

    def name(self, token: int) -> str:
        """The text of this token, wherever it stands; a token that is no text is named by its bytes."""
        known = self.bytes_of(token)
        try:
            return known.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in known)

    def spelling(self, token: int) -> str:
        """The vocabulary's name of this token, which no other has."""
        return self._piece(token) or f"token_id:{token}"

    def _piece(self, token: int) -> str | None:
        piece: str | None = self._tokenizer.convert_ids_to_tokens(token)
        return piece

    def _before(self) -> Sequence[int]:
        """A token after which others read as they do within a text."""
        if self._anchor is None:
            ordinary = (each for each in sorted(self._tokenizer.get_vocab().values()) if each not in self._special)
            self._anchor = next((each for each in ordinary if self._decode([each]).isalnum()), -1)
        return [self._anchor] if self._anchor >= 0 else []

    def _by_contexts(self, tokens: list[int], first: int) -> Iterator[str]:
        for place in range(first, len(tokens)):
            yield self.text([tokens[place]], after=tokens[max(0, place - CONTEXT_TOKENS) : place])

    def _decode(self, tokens: Sequence[int]) -> str:
        # Cleaning up would remove spaces before punctuation that the model wrote.
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if self._has_byte_tokens and REPLACEMENT in text:
            return self._decode_with_broken(tokens)
        return text

    def _decode_with_broken(self, tokens: Sequence[int]) -> str:
        """The text of byte tokens of which some are no character; the library would give up all beside them."""
        pieces: list[str] = []
        run = bytearray()
        for token in [each for each in tokens if each not in self._special]:
            piece = self._piece(token)
            if piece is not None and (byte := _BYTE_TOKEN.fullmatch(piece)):
                run += bytes.fromhex(byte[1])
            elif piece is not None:
                pieces += [*_byte_pieces(run), piece]
                run.clear()
        assert self._decoder is not None, "it has byte tokens"
        text: str = self._decoder.decode([*pieces, *_byte_pieces(run)])
        return text


def _byte_pieces(run: bytearray) -> Iterator[str]:
    """The byte tokens of a run, with one sign in the place of what is no character."""
    for letter in run.decode(errors="replace"):
        yield from [REPLACEMENT] if letter == REPLACEMENT else [f"<0x{byte:02X}>" for byte in letter.encode()]


def _characters(parts: Sequence[bytes]) -> Iterator[str]:
    """The characters that each part adds to the text of them all."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    last = max((place for place, each in enumerate(parts) if each), default=-1)
    for place, each in enumerate(parts):
        yield decoder.decode(each, final=place == last)


def _kinds(description: dict[str, Any]) -> Iterator[str]:
    """The kinds of decoders in a description of one."""
    yield description["type"]
    for each in description.get("decoders", ()):
        yield from _kinds(each)
