"""Schedules the tokens of the next step, in plain Python.

Owns the rows between their arrival and their last token: those that wait, those that run, and their slots of the cache.
It knows no tensor, no text and no sampling.

Each step computes one token of every row that decodes, and as many tokens of prompts as the budget leaves. Rows
enter longest first, so that no long one runs alone at the end; those whose prefix is in the cache enter before, and
those that waited long before all. When the cache is full, the row that came last is preempted: it keeps its tokens,
and computes them again later.
"""

from __future__ import annotations

from bisect import insort
from heapq import heappop, heappush
from typing import Any, Generic

from batchmill.worker.engine.continuous.scheduling.prefixes import Prefixes
from batchmill.worker.engine.continuous.scheduling.slots import Slot, Slots
from batchmill.worker.engine.continuous.scheduling.step import Copy, Piece, R, Row, Step

#: A row that waited while this many others per batch slot entered enters next.
PATIENCE = 4
#: Rows enter while this part of the cache stays free for the growth of those that run, if not all can have all.
RESERVE = 1 / 16


class Schedule(Generic[R]):
    """The rows of one engine.

    `batch_slots`: rows that run at once.
    `close_holes`: neighbours in the cache are worth a copy.
    `alone`: a row's forwards depend on that row alone: prompts one by one, and a slot for the whole row from its first
    step on.
    """

    def __init__(self, slots: Slots, *, batch_slots: int, close_holes: bool = True, alone: bool = False) -> None:
        self._slots = slots
        self._free_batch_slots = list(range(batch_slots))
        self._patience = PATIENCE * batch_slots
        self._close_holes = close_holes
        self._alone = alone
        self._prefixes: Prefixes[R] = Prefixes()
        self._waiting: list[R] = []
        self._running: list[R] = []
        self._kept: list[R] = []
        self._arrivals = 0
        self._entries = 0

    @property
    def waiting(self) -> int:
        """Rows without a batch slot."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Rows with a batch slot."""
        return len(self._running)

    def add(self, row: R) -> None:
        """Takes a row whose `most_tokens` a slot can hold."""
        self._arrivals += 1
        row.arrival, row.entries = self._arrivals, self._entries
        insort(self._waiting, row, key=_longest_first)

    def leave(self, row: R) -> None:
        """Forgets a row that has ended or was cancelled."""
        if row.batch_slot < 0:
            self._waiting.remove(row)
            return
        self._running.remove(row)
        self._leave_batch_slot(row)
        if row.computed < row.prompt_tokens or not row.proven:
            self._forget(row)
        else:
            self._kept.append(row)

    def computed(self, step: Step[R]) -> None:
        """Notes that the tokens of this step are in the cache."""
        for piece in step.pieces:
            piece.row.computed = piece.end

    def schedule(self, budget: int) -> Step[R]:
        """Plans the next step: at most `budget` tokens, and none only if there are no rows."""
        step: Step[R] = Step()
        if self._alone:
            self._plan_alone(step, budget)
        else:
            self._decode(step, budget)
            self._prefill(step, budget)
            self._admit(step, budget)
        self._forget_unwanted()
        if self._close_holes:
            self._move_down(step)
        step.pieces.sort(key=_in_reading_order)
        return step

    def schedule_ahead(self, step: Step[R]) -> Step[R] | None:
        """Plans the step after one of decoding rows, whose tokens are not known yet.

        Returns None where rows have to enter, to move, or to compute their prompts first. A row that ends with the
        token that is not known is computed in vain.
        """
        following = [Piece(row, end, end + 1) for row, _, end in step.pieces if row.batch_slot >= 0]
        decoding = all(
            piece.end - piece.begin == 1 and piece.sampled for piece in step.pieces if piece.row.batch_slot >= 0
        )
        entering = bool(self._free_batch_slots and self._waiting)
        room = all(piece.row.held.size >= piece.end for piece in following)
        if not following or not decoding or entering or not room or len(following) < len(self._running):
            return None
        return Step(following)

    def _plan_alone(self, step: Step[R], budget: int) -> None:
        """Plans a piece of one prompt, or else one token of each row that decodes."""
        self._prefill(step, budget, limit=1)
        if not step.pieces and len(self._running) < budget:  # more would be preempted as soon as all decode
            self._admit(step, budget, limit=1)
        if not step.pieces:
            self._decode(step, budget)

    def _decode(self, step: Step[R], budget: int) -> None:
        for row in sorted(self._running, key=lambda each: each.arrival):
            if row.batch_slot >= 0 and row.decodes and self._room_for_next(row, step):
                step.pieces.append(Piece(row, row.computed, row.computed + 1))
        while len(step.pieces) > budget:
            self._preempt(step.pieces.pop().row, step)

    def _room_for_next(self, row: R, step: Step[R]) -> bool:
        """Makes room for one more token of the row, preempting others. Returns False where it was preempted itself."""
        while row.held.size < len(row.tokens):
            slot = self._take(min(row.most_tokens, 2 * row.held.size))
            if slot is not None:
                self._move(row, slot, step)
                return True
            youngest = max(self._running, key=lambda each: each.arrival)
            self._preempt(youngest, step)
            if youngest is row:
                return False
        return True

    def _prefill(self, step: Step[R], budget: int, *, limit: int | None = None) -> None:
        for row in [row for row in self._running if not row.decodes][:limit]:
            self._add_piece(step, row, budget)

    def _admit(self, step: Step[R], budget: int, *, limit: int | None = None) -> None:
        """Lets waiting rows enter, while there are batch slots, slots and a budget for them."""
        for row in self._candidates():
            if not self._free_batch_slots or step.tokens >= budget or len(step.entered) == limit:
                return
            if self._enter(row, step, budget - step.tokens):
                self._add_piece(step, row, budget)
            elif self._impatient(row):
                return

    def _add_piece(self, step: Step[R], row: R, budget: int) -> None:
        end = min(len(row.tokens), row.computed + budget - step.tokens)
        if end > row.computed:
            step.pieces.append(Piece(row, row.computed, end))

    def _candidates(self) -> list[R]:
        """Orders the waiting rows: those that waited too long, those whose prefix is in the cache, then the longest."""
        if not self._free_batch_slots:
            return []
        return sorted(self._waiting, key=self._rank)

    def _rank(self, row: R) -> tuple[int, int]:
        return (0, row.arrival) if self._impatient(row) else (1 if self._prefixes.knows(row) else 2, 0)

    def _impatient(self, row: R) -> bool:
        return self._entries - row.entries > self._patience

    def _enter(self, row: R, step: Step[R], budget: int) -> bool:
        """Gives the row a batch slot and a KV slot, if there is room; a prompt beside others is read whole."""
        whole = row.most_tokens if self._alone else min(row.most_tokens, 2 * len(row.tokens))
        size = self._slots.size_for(whole)
        left = self._slots.free_tokens - size
        if self._running and left < RESERVE * self._slots.tokens and not self._all_fit(row):
            return False
        nearest = self._prefixes.nearest(row)
        known = 0
        if nearest is not None:
            donor, common = nearest
            if donor.computed < min(common, donor.prompt_tokens) or not donor.proven:
                return False  # the row that computes this prefix right now is copied in a later step
            known = min(common, donor.computed)
        if step.reads and len(row.tokens) - known > budget:
            return False
        slot = self._take(whole)
        if slot is None:
            return False
        row.slot, row.batch_slot = slot, heappop(self._free_batch_slots)
        # The row with the common prefix may have been forgotten to make room.
        source = nearest[0].slot if nearest is not None else None
        row.computed = known if source is not None else 0
        step.copies.append(Copy(slot, source, row.computed))
        self._waiting.remove(row)
        self._running.append(row)
        self._prefixes.enter(row)
        self._entries += 1
        step.entered.append(row)
        return True

    def _all_fit(self, row: R) -> bool:
        """True where this row and those that run can all grow to their most tokens."""
        return sum(self._slots.size_for(each.most_tokens) for each in (row, *self._running)) <= self._slots.tokens

    def _take(self, tokens: int) -> Slot | None:
        """Takes a slot, if need be that of a row that was kept."""
        slot = self._slots.take(tokens)
        while slot is None and self._kept:
            self._forget(self._kept.pop(0))
            slot = self._slots.take(tokens)
        return slot

    def _preempt(self, row: R, step: Step[R]) -> None:
        self._running.remove(row)
        step.vacated.append(row.batch_slot)
        self._leave_batch_slot(row)
        self._forget(row)
        row.computed = 0
        insort(self._waiting, row, key=_longest_first)

    def _leave_batch_slot(self, row: R) -> None:
        heappush(self._free_batch_slots, row.batch_slot)
        row.batch_slot = -1

    def _forget(self, row: R) -> None:
        self._prefixes.leave(row)
        self._slots.give(row.held)
        row.slot = None

    def _forget_unwanted(self) -> None:
        """Forgets the rows that ended, but for those that alone hold the prefix of a waiting row."""
        if not self._kept:
            return
        beginnings = {row.blocks[0] for row in self._waiting if row.blocks}
        for row in list(self._kept):
            if not (self._prefixes.alone(row) and row.blocks[0] in beginnings):
                self._kept.remove(row)
                self._forget(row)

    def _move_down(self, step: Step[R]) -> None:
        """Closes the holes that rows left, so that those which stay are neighbours."""
        for row in sorted(self._running, key=lambda each: -each.held.start):
            if self._slots.below(row.held):
                slot = self._slots.take(row.held.size)
                assert slot is not None, "a free slot was seen"
                self._move(row, slot, step)

    def _move(self, row: R, slot: Slot, step: Step[R]) -> None:
        step.copies.append(Copy(slot, row.held, row.computed))
        self._slots.give(row.held)
        row.slot = slot


def _longest_first(row: Row) -> tuple[int, int]:
    return -row.most_tokens, row.arrival


def _in_reading_order(piece: Piece[Any]) -> tuple[bool, bool, int]:
    """Orders rows that decode, pieces of prompts that were begun, and beginnings of prompts, these by length."""
    if piece.begin == 0 and piece.end > 1:
        return True, True, piece.end
    return piece.end - piece.begin > 1, False, piece.row.held.start
