"""Sizes for people, and sizes that people write."""

from __future__ import annotations

import pytest

from batchmill.jobs.errors import UsageError
from batchmill.jobs.runtime.sizes import bytes_of, size

GIB = 1024**3


@pytest.mark.parametrize(("count", "said"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (80 * 2**30, "80.0 GiB")])
def test_sizes_for_people(count: int, said: str) -> None:
    assert size(count) == said


@pytest.mark.parametrize(
    ("written", "count"), [("24GiB", 24 * GIB), ("1.5 gib", 3 * GIB // 2), ("900MB", 900 * 10**6), ("12B", 12)]
)
def test_sizes_are_read_with_their_unit(written: str, count: int) -> None:
    assert bytes_of(written) == count


@pytest.mark.parametrize("written", ["24", "GiB", "-1GiB", "0GiB", "24 parsecs", "1e9B", ""])
def test_a_size_without_a_unit_is_refused(written: str) -> None:
    with pytest.raises(UsageError, match="is no size of memory; write it with its unit"):
        bytes_of(written)


def test_a_size_that_is_shown_can_be_read() -> None:
    assert bytes_of(size(24 * GIB)) == 24 * GIB
