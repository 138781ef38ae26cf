"""Whether an answer is the right one: the same text, or text in which a pattern is found."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from jobs.errors import UsageError
from worker.evaluate.corpus import Corpus


class Match(StrEnum):
    """How an answer is compared with the data's: equal without the white space around it, or found as a regex."""

    EXACT = "exact"
    REGEX = "regex"


@dataclass(frozen=True, slots=True)
class Accuracy:
    """How many of the answers were right."""

    right: int
    answers: int

    @property
    def share(self) -> float:
        return self.right / self.answers


def accuracy(said: Sequence[str], answers: Sequence[str | None], match: Match) -> Accuracy | None:
    """Of what was said to questions, those that have an answer counted; None where none has."""
    pairs = [(text, answer) for text, answer in zip(said, answers, strict=True) if answer is not None]
    return Accuracy(sum(_is_right(*pair, match) for pair in pairs), len(pairs)) if pairs else None


def check_answers(corpus: Corpus, match: Match) -> None:
    """Raises UsageError, which names the line, for an answer that is to be a regex and is none."""
    if match is Match.REGEX:
        for example in corpus.examples:
            try:
                re.compile(example.answer or "")
            except re.error as error:
                raise UsageError(f"{corpus.name}:{example.line}: answer is no regex: {error}") from None


def _is_right(text: str, answer: str, match: Match) -> bool:
    if match is Match.REGEX:
        return re.search(answer, text) is not None
    return text.strip() == answer.strip()
