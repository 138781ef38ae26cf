"""Sizes for people, and sizes that people write."""

from __future__ import annotations

import pytest

from batchmill.jobs.runtime.sizes import size


@pytest.mark.parametrize(("count", "said"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (80 * 2**30, "80.0 GiB")])
def test_sizes_for_people(count: int, said: str) -> None:
    assert size(count) == said
