"""The scheduler alone, without tensors. Its steps are carried out on a list of the contents of each cache place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchmill.worker.engine.continuous.scheduling.prefixes import BLOCK_TOKENS
from batchmill.worker.engine.continuous.scheduling.schedule import PATIENCE, Schedule
from batchmill.worker.engine.continuous.scheduling.slots import SMALLEST_TOKENS, Slots
from batchmill.worker.engine.continuous.scheduling.step import Row, Step

LONGEST = 4 * SMALLEST_TOKENS


@dataclass
class Device:
    """Carries steps out: a place of the cache holds the hash of all tokens up to its own."""

    slots: Slots
    schedule: Schedule[Row]
    budget: int
    places: dict[int, int] = field(default_factory=dict)
    running: dict[int, Row] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    chains: dict[Row, list[int]] = field(default_factory=dict)
    computed_tokens: int = 0

    @classmethod
    def of(cls, *, tokens: int, batch_slots: int = 4, budget: int = 64, alone: bool = False) -> Device:
        slots = Slots(tokens, longest=LONGEST)
        return cls(slots, Schedule(slots, batch_slots=batch_slots, alone=alone), budget)

    def add(self, prompt: Sequence[int], answer_tokens: int) -> Row:
        row = Row(list(prompt), len(prompt) + answer_tokens)
        self.rows.append(row)
        self.schedule.add(row)
        return row

    def cancel(self, row: Row) -> None:
        if row in self.rows:
            self._leave(row)

    def step(self) -> Step[Row]:
        step = self.schedule.schedule(self.budget)
        for batch_slot in step.vacated:
            del self.running[batch_slot]
        for row in step.entered:
            assert row.batch_slot not in self.running
            self.running[row.batch_slot] = row
        for target, source, tokens in step.copies:
            for place in range(target.size):
                if source is not None and place < tokens:
                    self.places[target.start + place] = self.places[source.start + place]
                else:
                    self.places.pop(target.start + place, None)
        self._check(step)
        for row, begin, end in step.pieces:
            for place in range(begin, end):
                self.places[row.held.start + place] = self._chain(row)[place]
        self.computed_tokens += step.tokens
        self.schedule.computed(step)
        for piece in step.pieces:
            if piece.sampled:
                piece.row.tokens.append(self._chain(piece.row)[-1] % 7)
                if len(piece.row.tokens) == piece.row.most_tokens:
                    self._leave(piece.row)
        return step

    def drain(self) -> None:
        steps = 0
        while self.rows:
            self.step()
            steps += 1
            assert steps < 10_000, "a row starves"
        assert not self.schedule.schedule(self.budget).pieces

    def _leave(self, row: Row) -> None:
        if row.batch_slot >= 0:
            del self.running[row.batch_slot]
        self.schedule.leave(row)
        self.rows.remove(row)

    def _chain(self, row: Row) -> list[int]:
        chain = self.chains.setdefault(row, [])
        for token in row.tokens[len(chain) :]:
            chain.append(hash((chain[-1] if chain else 0, token)))
        return chain

    def _check(self, step: Step[Row]) -> None:
        assert 0 < step.tokens <= self.budget or not self.rows
        assert len({id(piece.row) for piece in step.pieces}) == len(step.pieces)
        held = sorted((row.held for row in self.running.values()), key=lambda slot: slot.start)
        assert all(one.end <= other.start for one, other in pairwise(held))
        assert all(slot.end <= self.slots.tokens for slot in held)
        for row, begin, end in step.pieces:
            assert begin == row.computed < end <= min(len(row.tokens), row.held.size)
            before = [self.places[row.held.start + place] for place in range(begin)]
            assert before == self._chain(row)[:begin]
            assert not any(row.held.start + place in self.places for place in range(begin, row.held.size))


PROMPTS = st.builds(
    lambda shared, own: [1] * shared + own,
    st.sampled_from([0, 0, BLOCK_TOKENS, 2 * BLOCK_TOKENS + 5]),
    st.lists(st.integers(0, 3), min_size=1, max_size=90),
)


@settings(max_examples=150)
@given(st.data())
def test_arrivals_cancels_and_a_full_cache_lose_nothing_and_use_nothing_twice(data: st.DataObject) -> None:
    draw = data.draw
    device = Device.of(
        tokens=draw(st.sampled_from([LONGEST, 2 * LONGEST, 16 * LONGEST, 64 * LONGEST])),
        batch_slots=draw(st.integers(1, 6)),
        budget=draw(st.sampled_from([2, 8, 33, 200])),
        alone=draw(st.booleans()),
    )
    for _ in range(draw(st.integers(1, 25))):
        action = draw(st.sampled_from(["add", "add", "cancel", "step", "step"]))
        if action == "add":
            prompt = draw(PROMPTS)
            device.add(prompt, draw(st.integers(1, LONGEST - len(prompt))))
        elif action == "cancel" and device.rows:
            device.cancel(draw(st.sampled_from(device.rows)))
        elif action == "step":
            device.step()
    device.drain()
    assert (device.schedule.waiting, device.schedule.running) == (0, 0)
    assert device.slots.free_tokens == device.slots.tokens


@pytest.mark.parametrize("alone", [False, True])
def test_no_more_rows_enter_than_a_step_decodes(alone: bool) -> None:
    """As after memory ran out; rows beyond them would be preempted and computed again for each token of the others."""
    device = Device.of(tokens=16 * LONGEST, batch_slots=4, budget=2, alone=alone)
    rows = [device.add([number] * 60, 50) for number in range(4)]
    device.drain()
    assert device.computed_tokens == sum(row.most_tokens - 1 for row in rows)


def test_the_longest_enter_first() -> None:
    device = Device.of(tokens=16 * LONGEST, batch_slots=2)
    rows = [device.add([place, *range(5)], answer) for place, answer in enumerate([3, 90, 10, 40])]
    assert device.step().entered == [rows[1], rows[3]]


def test_a_short_row_does_not_wait_for_ever_behind_longer_ones() -> None:
    device = Device.of(tokens=16 * LONGEST, batch_slots=2)
    short = device.add([9], 1)
    for number in range(2 * PATIENCE + 3):
        for _ in range(2):
            device.add([number, 1], 20)
        while len(device.rows) > 3:
            device.step()
    assert short not in device.rows


def test_a_common_beginning_is_computed_once() -> None:
    beginning = [5] * (3 * BLOCK_TOKENS)
    device = Device.of(tokens=16 * LONGEST, batch_slots=4, budget=512)
    for number in range(4):
        device.add([*beginning, number, number], 1)
    device.drain()
    assert device.computed_tokens == len(beginning) + 4 * 2


def test_a_beginning_outlives_its_row_while_others_wait_for_it() -> None:
    beginning = [5] * (3 * BLOCK_TOKENS)
    device = Device.of(tokens=16 * LONGEST, batch_slots=1, budget=512)
    for number in range(4):
        device.add([*beginning, number, number], 1)
    device.drain()
    assert device.computed_tokens == len(beginning) + 4 * 2
    assert device.slots.free_tokens == device.slots.tokens


def test_rows_with_a_known_beginning_enter_before_longer_ones() -> None:
    beginning = [5] * BLOCK_TOKENS
    device = Device.of(tokens=16 * LONGEST, batch_slots=2, budget=512)
    device.add([*beginning, 1], 200)
    device.step()
    longer = device.add([7] * BLOCK_TOKENS, 100)
    alike = device.add([*beginning, 2], 5)
    assert device.step().entered == [alike]
    assert longer in device.rows


def test_when_the_cache_is_full_the_row_that_came_last_is_put_back_with_its_tokens() -> None:
    device = Device.of(tokens=LONGEST, batch_slots=2)
    first, second = device.add([1] * 10, LONGEST - 10), device.add([2] * 10, LONGEST - 10)
    put_back = []
    while first in device.rows:
        step = device.step()
        if step.vacated:
            put_back.append(len(second.tokens))
    assert put_back
    assert put_back[0] > 10
    assert second in device.rows
    device.drain()
    assert len(second.tokens) == LONGEST


def test_a_long_prompt_is_read_between_the_steps_of_others() -> None:
    device = Device.of(tokens=16 * LONGEST, batch_slots=2, budget=32)
    first = device.add([1] * 4, 40)
    device.step()
    device.add([2] * 150, 2)
    steps = [device.step() for _ in range(5)]
    assert all(any(piece.row is first for piece in step.pieces) for step in steps)
    assert [step.tokens for step in steps[:4]] == [32] * 4


def test_a_hole_in_the_cache_is_closed() -> None:
    device = Device.of(tokens=16 * LONGEST, batch_slots=3)
    rows = [device.add([number] * 5, 9) for number in range(3)]
    device.step()
    device.cancel(rows[0])
    device.step()
    assert sorted(row.held.start for row in rows[1:]) == [0, SMALLEST_TOKENS]


def test_alone_each_prompt_is_read_by_itself_and_keeps_its_slot() -> None:
    device = Device.of(tokens=16 * LONGEST, batch_slots=3, alone=True)
    for number in range(3):
        device.add([number] * 5, 100)
    steps = [device.step() for _ in range(80)]
    assert [len(step.pieces) for step in steps[:5]] == [1, 1, 1, 3, 3]
    assert not any(copy.source for step in steps for copy in step.copies)
