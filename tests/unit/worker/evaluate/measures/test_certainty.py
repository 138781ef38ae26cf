"""The bounds of figures: against exact sums over all samples, so that 95 % is 95 %."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchmill.worker.evaluate.measures.certainty import of_difference, of_mean, of_p99, of_share


@pytest.mark.parametrize(("count", "true"), [(8, 0.5), (8, 0.9), (64, 0.5), (64, 0.9), (64, 0.98), (200, 0.98)])
def test_the_bounds_of_a_share_hold_for_nearly_all_samples(count: int, true: float) -> None:
    chances = [math.comb(count, each) * true**each * (1 - true) ** (count - each) for each in range(count + 1)]
    held = [
        (of_share(each / count, count).low <= true, of_share(each / count, count).high >= true)
        for each in range(count + 1)
    ]
    for side in range(2):
        assert sum(chance for chance, each in zip(chances, held, strict=True) if each[side]) > 0.9


@pytest.mark.parametrize(("lose", "gain"), [(0.01, 0.01), (0.05, 0.0), (0.1, 0.1), (0.2, 0.05)])
def test_the_bounds_of_a_difference_hold_for_nearly_all_samples(lose: float, gain: float) -> None:
    count, held = 60, 0.0
    for lost in range(count + 1):
        for gained in range(count + 1 - lost):
            same = count - lost - gained
            ways = math.comb(count, lost) * math.comb(count - lost, gained)
            if of_difference(lost, gained, count).high >= lose - gain:
                held += ways * lose**lost * gain**gained * (1 - lose - gain) ** same
    assert held > 0.93


def test_known_values() -> None:
    assert of_share(1.0, 64).low == pytest.approx(64 / (64 + 1.6449**2))
    assert of_share(0.0, 8).high == pytest.approx(1.6449**2 / (8 + 1.6449**2))
    assert of_mean(1.0, 0.1) == pytest.approx((0.83551, 1.16449))
    assert of_mean(1.0, 0.1, 4) == pytest.approx((0.917755, 1.082245))
    assert of_mean(1.0, None) == (-math.inf, math.inf)
    assert of_p99(0.5, 299) == (0.5, 0.5)
    assert of_p99(0.5, 298) == (0.0, math.inf)
    assert 1 - 0.99**299 > 0.95 > 1 - 0.99**298


@given(found=st.floats(0, 1), count=st.integers(1, 10**6))
def test_more_of_the_same_is_surer(found: float, count: int) -> None:
    few, many = of_share(found, count), of_share(found, 2 * count)
    slack = 1e-9
    assert few.low - slack <= many.low <= found + slack
    assert found - slack <= many.high <= few.high + slack
    differ = of_difference(found * count / 2, 0, count)
    assert -1 <= differ.low <= differ.high <= 1
