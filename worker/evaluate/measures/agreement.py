"""The agreement of greedy answers with the baseline's: their tokens up to the first different one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Agreement:
    """The agreement of one model's answers with the baseline's."""

    #: Tokens before the first different one, as a part of all tokens of the longer answers.
    share: float
    #: Whole answers that are the same.
    identical: int
    answers: int


def agreement(baseline: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> Agreement | None:
    """Compares two models' answers to the same questions, as tokens; None where there are none."""
    if not baseline:
        return None
    same = total = identical = 0
    for expected, answer in zip(baseline, answers, strict=True):
        pairs = enumerate(zip(expected, answer, strict=False))
        same += next((at for at, pair in pairs if pair[0] != pair[1]), min(len(expected), len(answer)))
        total += max(len(expected), len(answer))
        identical += list(expected) == list(answer)
    return Agreement(same / total if total else 1.0, identical, len(baseline))
