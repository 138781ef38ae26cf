"""OpenAI's logprobs object: the text that each token of a choice adds, and the likeliest tokens at each place.

It knows no device: the log probabilities are there already.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from batchmill.worker.engine.text.decoding import Decoding


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One generated token with its logprob, and the likeliest tokens at its place with theirs."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def logprobs_of(
    generated: Sequence[TokenLogprob], text: str, decoding: Decoding, *, after: Sequence[int]
) -> dict[str, Any]:
    """The object of a choice with this text; `after`: the tokens that it continues.

    One entry a token: `token` is the text that it adds, which is empty for an end token, for a token that a stop string
    cut off, and for all but the last of the tokens of one character. No two tokens at one place have the same name.
    """
    parts = decoding.parts([token.token for token in generated], after=after)
    content, begin = [], 0
    for token, (part, known) in zip(generated, parts, strict=True):
        content.append(_entry(token, text[begin : begin + len(part)], known, decoding))
        begin += len(part)
    return {"content": content}


def _entry(generated: TokenLogprob, text: str, known: bytes, decoding: Decoding) -> dict[str, Any]:
    chosen = {"token": text, "logprob": generated.logprob, "bytes": list(known)}
    taken, top = {text}, []
    for token, logprob in generated.top:
        if token == generated.token:
            top.append(chosen)
            continue
        name = decoding.name(token)
        if name in taken or not name:
            name = decoding.spelling(token)
        taken.add(name)
        top.append({"token": name, "logprob": logprob, "bytes": list(decoding.bytes_of(token))})
    return chosen | {"top_logprobs": top}
