"""The accuracy of answers: the right one is the same text, or a text in which a pattern is found."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from batchmill.jobs.errors import UsageError
from batchmill.worker.evaluate.data.corpus import Corpus


class Match(StrEnum):
    """The comparison of an answer with the data's: equal without the white space around it, or found as a regex."""

    EXACT = "exact"
    REGEX = "regex"


@dataclass(frozen=True, slots=True)
class Accuracy:
    """The count of right answers."""

    right: int
    answers: int
    #: Answers that are wrong where the baseline's are right; None without a baseline.
    lost: int | None = None
    #: Answers that are right where the baseline's are wrong; None without a baseline.
    gained: int | None = None

    @property
    def share(self) -> float:
        return self.right / self.answers


def accuracy(
    texts: Sequence[str], answers: Sequence[str | None], match: Match, *, baseline: Sequence[str] | None = None
) -> Accuracy | None:
    """Counts the right texts, of questions for which the data has an answer; None where none has.

    `baseline`: the baseline's texts.
    """
    right = _right(texts, answers, match)
    if not right:
        return None
    if baseline is None:
        return Accuracy(sum(right), len(right))
    before = _right(baseline, answers, match)
    lost, gained = (
        sum(one and not other for one, other in zip(*pair, strict=True)) for pair in ((before, right), (right, before))
    )
    return Accuracy(sum(right), len(right), lost, gained)


def check_answers(corpus: Corpus, match: Match) -> None:
    """Raises UsageError, which names the line, for an answer that should be a regex and is none."""
    if match is Match.REGEX:
        for example in corpus.examples:
            try:
                re.compile(example.answer or "")
            except re.error as error:
                raise UsageError(f"{corpus.name}:{example.line}: answer is no regex: {error}") from None


def _right(texts: Sequence[str], answers: Sequence[str | None], match: Match) -> list[bool]:
    pairs = zip(texts, answers, strict=True)
    return [_is_right(text, answer, match) for text, answer in pairs if answer is not None]


def _is_right(text: str, answer: str, match: Match) -> bool:
    if match is Match.REGEX:
        return re.search(answer, text) is not None
    return text.strip() == answer.strip()
