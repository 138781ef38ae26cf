"""The loss of one model against another in one column of a report: how large, how certain, and whether it is little.

Owns the limits of little. It reads two rows of a report, and knows nothing of the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from batchmill.worker.evaluate.measures.accuracy import Accuracy
from batchmill.worker.evaluate.measures.certainty import Bounds, of_difference, of_mean, of_p99, of_share
from batchmill.worker.evaluate.measures.measurement import Measurement

#: Limits of little: perplexity up to this part above the other's, a mean divergence and one of 99 in 100 tokens up
#: to so many nats, up to this part of all answers fewer that are right, and of their tokens that are others.
PERPLEXITY = 0.05
DIVERGENCE = 0.1
DIVERGENCE_P99 = 1.0
ACCURACY = 0.02
AGREEMENT = 0.1
#: The same in words.
LIMITS = (
    f"perplexity +{PERPLEXITY:.0%}, mean KL {DIVERGENCE}, KL p99 {DIVERGENCE_P99}, {ACCURACY:.0%} of the answers fewer "
    f"right, {AGREEMENT:.0%} of their tokens not the same"
)


class Certainty(Enum):
    """The verdict on a loss: surely little, surely much, or not to be told from what was measured."""

    LITTLE = "little"
    MUCH = "much"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Measured:
    """The finding in one column."""

    #: The figure in words.
    words: str
    #: Words for how bad it may still be, from the upper bound of the loss.
    worst: Callable[[float], str]
    limit: float
    #: The bounds of the loss, had so many times as much been measured to the same figures.
    bounds: Callable[[float], Bounds]
    #: The number of answers that it rests on; None where it rests on the tokens of the text.
    answers: int | None = None
    #: It counts different answers, which are not always worse ones.
    is_change: bool = False
    #: The other model's figure.
    beside: str = ""

    @property
    def verdict(self) -> Certainty:
        return self.verdict_of(1)

    def verdict_of(self, times: float) -> Certainty:
        low, high = self.bounds(times)
        if high <= self.limit:
            return Certainty.LITTLE
        return Certainty.MUCH if low > self.limit else Certainty.UNKNOWN

    def __str__(self) -> str:
        """The figure, with how bad it may be where that is not certain."""
        notes = [self.beside] if self.beside else []
        if self.verdict is Certainty.UNKNOWN:
            high = self.bounds(1).high
            notes.append(f"maybe {self.worst(high) if math.isfinite(high) else 'more'}")
        return f"{self.words} ({'; '.join(notes)})" if notes else self.words


def findings(each: Measurement, reference: Measurement) -> list[Measured]:
    """A finding for each column of quality that both rows have."""
    columns = [_perplexity(each, reference)]
    if (divergence := each.divergence) is not None:
        mean, error, p99, places = divergence.mean, divergence.standard_error, divergence.p99, divergence.places
        columns += [
            Measured(
                f"mean KL {mean:.2g}", lambda high: f"up to {high:.2g}", DIVERGENCE,
                lambda times: of_mean(mean, error, times),
            ),
            Measured(
                f"KL p99 {p99:.2g}", lambda high: f"up to {high:.2g}", DIVERGENCE_P99,
                lambda times: of_p99(p99, places * times),
            ),
        ]  # fmt: skip
    if (agreement := each.agreement) is not None:
        share, answers = agreement.share, agreement.answers
        columns.append(
            Measured(
                f"same tokens {share:.1%} of {answers:,} {plural(answers)}",
                lambda high: f"down to {1 - high:.1%}",
                AGREEMENT,
                lambda times: _turned(of_share(share, answers * times)),
                answers,
                is_change=True,
            )
        )
    if each.accuracy is not None and reference.accuracy is not None:
        columns.append(_accuracy(each.accuracy, reference.accuracy))
    return columns


def _perplexity(each: Measurement, reference: Measurement) -> Measured:
    ratio, change = each.perplexity / reference.perplexity, each.perplexity_change
    error = 0.0 if change is None else change.standard_error

    def bounds(times: float) -> Bounds:
        low, high = of_mean(math.log(ratio), error, times)
        return Bounds(math.expm1(low), math.expm1(high))

    return Measured(f"perplexity {ratio - 1:+.1%}", lambda worst: f"up to {worst:+.1%}", PERPLEXITY, bounds)


def _accuracy(accuracy: Accuracy, reference: Accuracy) -> Measured:
    count = accuracy.answers
    lost, gained = _differing(accuracy, reference)
    return Measured(
        f"{accuracy.right:,} of {count:,} {plural(count)} right",
        lambda high: f"up to {high:.1%} fewer",
        ACCURACY,
        lambda times: of_difference(lost * times, gained * times, count * times),
        count,
        beside=f"{reference.right:,} with it",
    )


def _differing(accuracy: Accuracy, reference: Accuracy) -> tuple[float, float]:
    """Counts answers that are right in one of both alone; where nobody compared them, as many as chance makes."""
    if accuracy.lost is not None and accuracy.gained is not None:
        return accuracy.lost, accuracy.gained
    both = accuracy.right * reference.right / accuracy.answers
    return reference.right - both, accuracy.right - both


def _turned(share: Bounds) -> Bounds:
    return Bounds(1 - share.high, 1 - share.low)


def plural(count: int) -> str:
    """The noun for so many answers."""
    return "answer" if count == 1 else "answers"
