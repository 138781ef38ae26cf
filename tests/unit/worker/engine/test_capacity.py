"""The capacity of a device: halved when memory runs out, and slowly grown again."""

from __future__ import annotations

from batchmill.worker.engine.capacity import CLEAN_STEPS, Capacity


def test_it_halves_down_to_one_and_says_what_it_found() -> None:
    capacity = Capacity(100)
    assert capacity.found is None
    found = []
    for _ in range(8):
        capacity.too_much(capacity.limit)
        found.append(capacity.found)
    assert found == [50, 25, 12, 6, 3, 1, 1, 1]


def test_what_failed_counts_and_not_what_was_allowed() -> None:
    capacity = Capacity(100)
    capacity.too_much(10)
    assert capacity.limit == 5


def test_it_grows_by_a_tenth_after_clean_steps_of_nearly_full_size_and_never_past_the_most() -> None:
    capacity = Capacity(60, found=50)
    for _ in range(100):
        capacity.held(10)
    assert capacity.limit == 50
    for _ in range(CLEAN_STEPS):
        capacity.held(40)
    assert (capacity.limit, capacity.found) == (55, 55)
    for _ in range(100):
        capacity.held(55)
    assert capacity.limit == 60


def test_a_size_found_earlier_is_where_it_begins() -> None:
    assert Capacity(100, found=30).limit == 30
    assert Capacity(20, found=30).limit == 20
    assert Capacity(100).limit == 100
