"""Bounds of how far a figure may be from what endless data would show: each holds with about 95 % certainty.

It is plain arithmetic on counts, means and standard errors.
"""

from __future__ import annotations

import math
from typing import NamedTuple

#: The quantile of the normal distribution that 95 % lie below.
_Z = 1.6449
#: The largest of fewer values tells nothing of what 99 in 100 lie below: 1 - 0.99 ** 299 is 95 %.
_FEWEST_OF_P99 = 299


class Bounds(NamedTuple):
    """The lower and the upper bound of a figure."""

    low: float
    high: float


def of_mean(mean: float, standard_error: float | None, times: float = 1.0) -> Bounds:
    """Bounds of a mean, had `times` as many values been measured; unknown without a standard error."""
    if standard_error is None:
        return Bounds(-math.inf, math.inf)
    standard_error /= math.sqrt(times)
    return Bounds(mean - _Z * standard_error, mean + _Z * standard_error)


def of_share(share: float, count: float) -> Bounds:
    """Bounds of a share of `count` answers: Wilson's score interval, wide enough for a mean of shares, too."""
    spread = _Z * math.sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2))
    middle = share + _Z**2 / (2 * count)
    whole = 1 + _Z**2 / count
    return Bounds(max(0.0, (middle - spread) / whole), min(1.0, (middle + spread) / whole))


def of_difference(lost: float, gained: float, count: float) -> Bounds:
    """Bounds of the share by which fewer of `count` questions are answered right, in pairs, by Bonett and Price.

    `lost`: right in the first of both alone; `gained`: in the second alone.
    """
    lose, gain = (lost + 1) / (count + 2), (gained + 1) / (count + 2)
    spread = _Z * math.sqrt((lose + gain - (lose - gain) ** 2) / (count + 2))
    return Bounds(max(-1.0, lose - gain - spread), min(1.0, lose - gain + spread))


def of_p99(p99: float, count: float) -> Bounds:
    """Bounds of what 99 in 100 of `count` values, none below zero, lie below; unknown where they are too few."""
    return Bounds(p99, p99) if count >= _FEWEST_OF_P99 else Bounds(0.0, math.inf)
