"""One step of the engine: pieces of rows, and the copies within the cache that come before.

Owns these values; `schedule` decides them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

from batchmill.worker.engine.continuous.scheduling.prefixes import block_hashes
from batchmill.worker.engine.continuous.scheduling.slots import Slot


@dataclass(slots=True, eq=False)
class Row:
    """One sequence of tokens: a prompt and the answer so far."""

    tokens: list[int]
    #: Its length at the most.
    most_tokens: int
    #: True where it may copy the prefix of another row, and others its own.
    share: bool = True
    #: The number of the adapter that computes it, 0 for none.
    adapter: int = 0
    prompt_tokens: int = field(init=False)
    #: The hashes of its prompt's blocks; none where it shares no prefix.
    blocks: tuple[int, ...] = field(init=False)
    #: Its tokens that have keys and values in the cache.
    computed: int = 0
    #: Its place in the cache; None without one.
    slot: Slot | None = None
    #: Its place among the rows that run, which it keeps while it does; -1 without one.
    batch_slot: int = -1
    #: Its number in the order of arrival.
    arrival: int = 0
    #: The rows that had entered when it arrived.
    entries: int = 0

    def __post_init__(self) -> None:
        self.prompt_tokens = len(self.tokens)
        self.blocks = block_hashes(self.tokens, adapter=self.adapter) if self.share else ()

    @property
    def decodes(self) -> bool:
        """True where all but its newest token is in the cache."""
        return self.computed == len(self.tokens) - 1

    @property
    def proven(self) -> bool:
        """True once its prompt was answered by numbers: only then may others copy what it has computed."""
        return len(self.tokens) > self.prompt_tokens

    @property
    def held(self) -> Slot:
        assert self.slot is not None, "a row that runs has a slot"
        return self.slot


R = TypeVar("R", bound=Row)


class Piece(NamedTuple, Generic[R]):
    """The tokens of one row that one step computes: from `begin` to before `end`."""

    row: R
    begin: int
    end: int

    @property
    def sampled(self) -> bool:
        """True where the row's next token follows from it."""
        return self.end == len(self.row.tokens)


class Copy(NamedTuple):
    """The content of a slot when a row gets it: the first tokens of another slot, if any, and zeros behind.

    Places behind a row's tokens are read beside them, with weight 0; another row may have left a NaN there, and NaN
    times 0 is NaN.
    """

    target: Slot
    source: Slot | None = None
    tokens: int = 0


@dataclass(slots=True)
class Step(Generic[R]):
    """The next step."""

    #: Decoding rows come first, then pieces of prompts, in the order of the cache; beginnings by length.
    pieces: list[Piece[R]] = field(default_factory=list)
    #: Done one after the other before anything is computed.
    copies: list[Copy] = field(default_factory=list)
    #: Rows that have a batch slot from this step on.
    entered: list[R] = field(default_factory=list)
    #: Batch slots of rows that were preempted; rows that enter may have them.
    vacated: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(piece.end - piece.begin for piece in self.pieces)

    @property
    def reads(self) -> bool:
        """True where prompts are a part of it."""
        return any(piece.end - piece.begin > 1 for piece in self.pieces)
