"""The arena of slots alone: slots that are taken and given back, in any order."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from batchmill.worker.engine.continuous.scheduling.slots import CHUNK_TOKENS, SMALLEST_TOKENS, Slot, Slots


@settings(max_examples=150)
@given(st.data())
def test_no_place_is_taken_twice_and_all_come_back(data: st.DataObject) -> None:
    draw = data.draw
    longest = draw(st.integers(1, 5_000))
    slots = Slots(draw(st.integers(longest, 60_000)), longest=longest)
    taken: list[Slot] = []
    for _ in range(draw(st.integers(1, 60))):
        if taken and draw(st.booleans()):
            slots.give(taken.pop(draw(st.integers(0, len(taken) - 1))))
            continue
        tokens = draw(st.integers(1, longest))
        slot = slots.take(tokens)
        if slot is None:
            assert taken, "an empty arena holds the longest row"
            continue
        assert tokens <= slot.size
        assert slot.end <= slots.tokens
        assert all(slot.end <= other.start or other.end <= slot.start for other in taken)
        taken.append(slot)
    for slot in taken:
        slots.give(slot)
    assert slots.free_tokens == slots.tokens
    whole = slots.take(longest)
    assert whole is not None
    assert whole.start == 0


def test_slots_of_one_size_are_neighbours() -> None:
    slots = Slots(64 * 256, longest=4_096)
    taken = [slots.take(200) for _ in range(4)]
    assert taken == [Slot(256 * number, 256) for number in range(4)]


def test_long_and_short_rows_share_an_arena_that_one_row_could_fill() -> None:
    slots = Slots(32_768, longest=32_768)
    short = [slots.take(tokens) for tokens in (50, 100, 1_000, 5_000)]
    assert None not in short
    assert slots.take(32_768) is None


def test_a_freed_slot_is_taken_again_before_higher_ones() -> None:
    slots = Slots(CHUNK_TOKENS, longest=1_024)
    first, second, third = (slots.take(SMALLEST_TOKENS) for _ in range(3))
    assert first is not None
    assert second is not None
    assert third is not None
    slots.give(second)
    assert slots.below(third)
    assert not slots.below(first)
    assert slots.take(1) == second
