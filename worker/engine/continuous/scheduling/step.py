"""What one step of the engine computes: pieces of rows, and the copies within the cache that come before.

Owns these values, and no decision about them: those are `schedule`'s.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

from batchmill.worker.engine.continuous.scheduling.prefixes import block_hashes
from batchmill.worker.engine.continuous.scheduling.slots import Slot


@dataclass(slots=True, eq=False)
class Row:
    """One sequence of tokens: a prompt and the answer so far.

    `most_tokens`: its length at the most. `adapter`: the number of the one that computes it, 0 for none. `computed`:
    how many of its tokens have keys and values in the cache. `batch_slot`: its place among the rows that run, which it
    keeps while it does; -1 before.
    """

    tokens: list[int]
    most_tokens: int
    share: bool = True
    adapter: int = 0
    prompt_tokens: int = field(init=False)
    blocks: tuple[int, ...] = field(init=False)
    computed: int = 0
    slot: Slot | None = None
    batch_slot: int = -1
    arrival: int = 0
    entries: int = 0

    def __post_init__(self) -> None:
        self.prompt_tokens = len(self.tokens)
        self.blocks = block_hashes(self.tokens, adapter=self.adapter) if self.share else ()

    @property
    def decodes(self) -> bool:
        """Whether all but its newest token is in the cache."""
        return self.computed == len(self.tokens) - 1

    @property
    def proven(self) -> bool:
        """Whether its prompt was answered by numbers: only then may others copy what it has computed."""
        return len(self.tokens) > self.prompt_tokens

    @property
    def held(self) -> Slot:
        assert self.slot is not None, "a row that runs has a slot"
        return self.slot


R = TypeVar("R", bound=Row)


class Piece(NamedTuple, Generic[R]):
    """What one step computes of one row: its tokens from `begin` to before `end`."""

    row: R
    begin: int
    end: int

    @property
    def sampled(self) -> bool:
        """Whether the row's next token follows from it."""
        return self.end == len(self.row.tokens)


class Copy(NamedTuple):
    """What a slot of the cache holds when a row gets it: the first tokens of another, if any, and zeros behind.

    Places behind a row's tokens are read beside them, with no weight; what another row left there may be NaN, and no
    weight makes that 0.
    """

    target: Slot
    source: Slot | None = None
    tokens: int = 0


@dataclass(slots=True)
class Step(Generic[R]):
    """The next step. Decoding rows come first, then pieces of prompts, in the order of the cache; beginnings by length.

    `copies` are done one after the other before anything is computed. Then rows lost the batch slots `vacated`, and
    others `entered`.
    """

    pieces: list[Piece[R]] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)
    entered: list[R] = field(default_factory=list)
    vacated: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(piece.end - piece.begin for piece in self.pieces)

    @property
    def reads(self) -> bool:
        """Whether prompts are a part of it."""
        return any(piece.end - piece.begin > 1 for piece in self.pieces)
