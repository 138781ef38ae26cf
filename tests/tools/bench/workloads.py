"""The workloads: requests of exact prompt and answer lengths, the same for every contestant.

Owns the lengths and the texts. It knows no model but for its tokenizer, and no contestant.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

_SEED = 7
_SHARED_TOKENS = 512
_LONG_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: the text and the tokens that it becomes, the first of them included that the tokenizer adds.

    Its answer has `answer_tokens`, whatever the model says: greedy, and no end token ends it.
    """

    text: str
    tokens: tuple[int, ...]
    answer_tokens: int


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests measured together. `shared_tokens`: how many tokens all of their prompts begin with."""

    name: str
    title: str
    asks: tuple[Ask, ...]
    shared_tokens: int = 0

    @property
    def prompt_tokens(self) -> int:
        return sum(len(ask.tokens) for ask in self.asks)

    @property
    def answer_tokens(self) -> int:
        return sum(ask.answer_tokens for ask in self.asks)

    @property
    def longest_tokens(self) -> int:
        """The most that a prompt and its answer have together."""
        return max(len(ask.tokens) + ask.answer_tokens for ask in self.asks)

    def first(self, count: int) -> Workload:
        return Workload(self.name, self.title, self.asks[:count], self.shared_tokens)


@dataclass(frozen=True, slots=True)
class _Plan:
    title: str
    #: Lengths of prompt and answer in tokens, one pair a request.
    lengths: Callable[[random.Random, bool], list[tuple[int, int]]]
    shared_tokens: int = 0


def _heavy_tailed(chance: random.Random, large: bool) -> list[tuple[int, int]]:
    """Most prompts and answers are short, some are long."""

    def length(most: int) -> int:
        return min(most, int(8 * chance.paretovariate(0.9)))

    return [(length(128), length(64)) for _ in range(96 if large else 256)]


def _uniform(_: random.Random, large: bool) -> list[tuple[int, int]]:
    return [(48, 32)] * 64


def _shared(answer_tokens: int) -> Callable[[random.Random, bool], list[tuple[int, int]]]:
    def lengths(chance: random.Random, large: bool) -> list[tuple[int, int]]:
        return [(_SHARED_TOKENS + chance.randint(8, 32), answer_tokens) for _ in range(32 if large else 64)]

    return lengths


def _long(_: random.Random, large: bool) -> list[tuple[int, int]]:
    return [(_LONG_TOKENS, 16)] * (16 if large else 32)


#: By the name that the command line takes.
PLANS = {
    "a": _Plan("heavy-tailed: prompts of 8-128 tokens, answers of 8-64", _heavy_tailed),
    "b": _Plan("uniform: prompts of 48 tokens, answers of 32, 64 at once", _uniform),
    "c": _Plan("a shared prefix of 512 tokens, 8-32 of one's own, answers of 16", _shared(16), _SHARED_TOKENS),
    "c1": _Plan("the prefill of c alone: answers of one token", _shared(1), _SHARED_TOKENS),
    "d": _Plan("long prompts of 1,024 tokens, answers of 16", _long),
}


def workload(name: str, folder: Path, *, large: bool) -> Workload | None:
    """The workload of this name for the model of a folder; None where its context is too short.

    `large` models get fewer requests.
    """
    plan = PLANS[name]
    chance = random.Random(_SEED)
    lengths = plan.lengths(chance, large)
    if max(map(sum, lengths)) > _context_tokens(folder):
        return None
    return asked(folder, name, plan.title, lengths, shared_tokens=plan.shared_tokens, chance=chance)


def asked(
    folder: Path,
    name: str,
    title: str,
    lengths: Sequence[tuple[int, int]],
    *,
    shared_tokens: int = 0,
    chance: random.Random | None = None,
) -> Workload:
    """Requests for the model of a folder, of these lengths of prompt and answer in tokens."""
    chance = chance or random.Random(_SEED)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    words = _pieces(tokenizer)
    added = len(tokenizer.encode("").ids)
    # The first token of all is the tokenizer's own, and part of what is shared.
    shared = "".join(chance.choices(words, k=max(0, shared_tokens - added)))
    asks = [_ask(tokenizer, shared, words, chance, length) for length in lengths]
    if shared_tokens == 0:
        _differ(asks)
    return Workload(name, title, tuple(asks), shared_tokens)


def _ask(
    tokenizer: Tokenizer, shared: str, words: Sequence[str], chance: random.Random, length: tuple[int, int]
) -> Ask:
    prompt_tokens, answer_tokens = length
    missing = prompt_tokens - len(tokenizer.encode(shared).ids)
    text = shared + "".join(chance.choices(words, k=missing))
    tokens = tuple(tokenizer.encode(text).ids)
    if len(tokens) != prompt_tokens:
        raise SystemExit(f"bench: a prompt of {prompt_tokens} tokens has become one of {len(tokens)}")
    return Ask(text, tokens, answer_tokens)


def _differ(asks: Sequence[Ask]) -> None:
    """Prompts that are to share nothing are all different."""
    if len({ask.tokens for ask in asks}) != len(asks):
        raise SystemExit("bench: two prompts are the same")


def _context_tokens(folder: Path) -> int:
    """The most tokens that a prompt and its answer may have together."""
    tokens: int = json.loads((folder / "config.json").read_text())["max_position_embeddings"]
    return tokens


def _pieces(tokenizer: Tokenizer) -> list[str]:
    """Texts that are one token each, and stay so side by side: the made words, or else the letters."""
    words = sorted(each for each in tokenizer.get_vocab() if each.startswith("w") and each.endswith("."))
    return words or list("abcdefghijklmnopqrstuvwxyz")
