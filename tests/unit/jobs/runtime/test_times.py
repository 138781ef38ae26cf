"""Durations for people."""

from __future__ import annotations

import pytest

from batchmill.jobs.runtime.times import duration


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.4, "0 s"),
        (59, "59 s"),
        (60, "1 min 0 s"),
        (3_599, "59 min 59 s"),
        (7_500, "2 h 5 min"),
        (2 * 86_400 - 1, "47 h 59 min"),
        (2 * 86_400, "2 d 0 h"),
        (273_700, "3 d 4 h"),
    ],
)
def test_durations_for_people(seconds: float, said: str) -> None:
    assert duration(seconds) == said
