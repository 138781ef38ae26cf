"""A corpus under one tokenizer: passages whose tokens are scored, and the questions that are continued.

Owns what of an example is scored, and what is asked. It tokenizes by worker.engine.text.tokenization, as a worker does,
so that an evaluation reads what a worker would read. It knows no model's weights and no device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from batchmill.jobs.errors import UsageError
from batchmill.jobs.requests.generation import GenerationRequest, SamplingParams
from batchmill.worker.engine.refused import Refused
from batchmill.worker.engine.text.tokenization import Prompt, Tokenization
from batchmill.worker.evaluate.data.corpus import Corpus, DataEntry
from batchmill.worker.models.load import LoadedModel

#: Tokens of a text that a continuation begins with, where the data asks nothing.
PROMPT_TOKENS = 64
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Passage:
    """Tokens that are read together."""

    tokens: tuple[int, ...] = field(repr=False)
    #: The tokenizer's token for the beginning of a text, if it writes one; every window repeats it.
    begin: tuple[int, ...] = ()
    #: The place in `tokens` of the first one that is scored.
    first: int = 0

    @property
    def scored(self) -> int:
        """The number of tokens that can be scored; a token with nothing before it cannot."""
        return max(0, len(self.tokens) - max(self.first, 0 if self.begin else 1))


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt that is continued greedily."""

    request: GenerationRequest = field(repr=False)
    prompt_tokens: int
    #: The right answer, where the data has one.
    answer: str | None = field(repr=False)


class Passages:
    """A corpus as one tokenizer reads it: the same for every quantization of a model."""

    def __init__(self, corpus: Corpus, loaded: LoadedModel) -> None:
        self._corpus = corpus
        self._tokenizer = loaded.tokenizer
        self._begin_token = loaded.tokenizer.bos_token_id
        self._tokenization = Tokenization.of(loaded, context_tokens=None)

    def scored(self, most_tokens: int) -> tuple[Passage, ...]:
        """The passages of the file's first `most_tokens` scored tokens. Raises UsageError if there are none.

        A text is scored as a whole, an answer after its prompt, and a prompt without an answer as a text.
        """
        passages: list[Passage] = []
        left = most_tokens
        for example in self._corpus.examples:
            passage = self._passage(example)
            spare = passage.scored - left
            if spare > 0:
                passage = Passage(passage.tokens[:-spare], passage.begin, passage.first)
            if passage.scored:
                passages.append(passage)
                left -= passage.scored
            if left <= 0:
                break
        if not passages:
            raise UsageError(f"{self._corpus.name}: none of its texts is long enough: one needs at least two tokens")
        return tuple(passages)

    def questions(self, count: int, *, max_tokens: int, context_tokens: int | None) -> tuple[Question, ...]:
        """Up to `count` greedy requests, taken evenly from the file, without those that leave no room for an answer.

        They are the data's own questions, or else pieces of its texts.
        """
        asking = [each for each in self._corpus.examples if each.asks]
        if asking:
            prompts = [(each, self._asked(each)) for each in _evenly(asking, count)]
            drafts = [(each.prompt, each.messages, each.answer, len(prompt.tokens)) for each, prompt in prompts]
        else:
            places = _evenly(list(self._places()), count)
            drafts = [(self._tokenization.decoding.text(place), None, None, len(place)) for place in places]
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        return tuple(
            Question(GenerationRequest(index, str(index), prompt, messages, sampling), length, answer)
            for index, (prompt, messages, answer, length) in enumerate(drafts)
            if context_tokens is None or length < context_tokens
        )

    def _passage(self, example: DataEntry) -> Passage:
        if example.text is not None:
            return self._text(example, example.text)
        asked = list(self._asked(example).tokens)
        if not example.answer:
            return self._begun(asked, 0)
        if example.prompt is None:
            answer = self._tokenizer.encode(example.answer, add_special_tokens=False)
            return self._begun([*asked, *answer], len(asked))
        together = list(self._tokens(example, f"{example.prompt}{_between(example)}{example.answer}").tokens)
        same = next((at for at, pair in enumerate(zip(asked, together, strict=False)) if pair[0] != pair[1]), None)
        return self._begun(together, min(len(asked), len(together)) if same is None else same)

    def _text(self, example: DataEntry, text: str) -> Passage:
        return self._begun(list(self._tokens(example, text).tokens), 0) if text else Passage(())

    def _asked(self, example: DataEntry) -> Prompt:
        return self._tokens(example, example.prompt)

    def _tokens(self, example: DataEntry, text: str | None) -> Prompt:
        request = GenerationRequest(0, "0", text, example.messages, SamplingParams(max_tokens=1))
        try:
            return self._tokenization.prompt(request)
        except Refused as refused:
            raise UsageError(f"{self._corpus.name}:{example.line}: {refused}") from None

    def _begun(self, tokens: list[int], first: int) -> Passage:
        """A passage of these tokens, of which those from `first` on are scored."""
        if tokens and tokens[0] == self._begin_token:
            return Passage(tuple(tokens[1:]), (tokens[0],), max(0, first - 1))
        return Passage(tuple(tokens), (), first)

    def _places(self) -> Iterator[Sequence[int]]:
        """Pieces of the texts, one after the other; of a text that is short, its first half."""
        for example in self._corpus.examples:
            tokens = self._passage(example).tokens
            if len(tokens) < 2 * PROMPT_TOKENS:
                pieces = [tokens[: len(tokens) // 2]]
            else:
                begins = range(0, len(tokens) - PROMPT_TOKENS, PROMPT_TOKENS)
                pieces = [tokens[begin : begin + PROMPT_TOKENS] for begin in begins]
            yield from filter(None, pieces)


def _between(example: DataEntry) -> str:
    """The space between a plain prompt and its answer, unless one of them has it."""
    assert example.prompt is not None
    assert example.answer is not None
    joined = example.prompt[-1:].isspace() or example.answer[:1].isspace()
    return "" if joined else " "


def _evenly(each: Sequence[T], count: int) -> list[T]:
    """At most `count` of these, evenly spread."""
    if len(each) <= count:
        return list(each)
    return [each[number * len(each) // count] for number in range(count)]
