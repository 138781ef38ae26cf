"""Sliding windows over passages: every token is scored once, after as many others as its window holds before it.

Owns the arithmetic of windows and of batches of them. It knows no tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from batchmill.worker.evaluate.data.passages import Passage


class Window(NamedTuple):
    """Tokens that a model reads at once; those from `first` on (1 or later) are scored."""

    tokens: tuple[int, ...]
    first: int

    @property
    def scored(self) -> int:
        return len(self.tokens) - self.first


def windows(passages: Iterable[Passage], *, width: int, stride: int) -> list[Window]:
    """Cuts passages into windows of `width` tokens, each `stride` further than the last, that score a token.

    The first window of a passage scores all of its tokens, each later one its new ones. Without a token for the
    beginning of a text, the first token of a window has nothing before it, and is not scored.
    """
    return [window for passage in passages for window in _windows(passage, width, stride)]


def _windows(passage: Passage, width: int, stride: int) -> Iterator[Window]:
    begins = len(passage.begin)
    room = width - begins
    step = min(stride, room)
    done, total = passage.first, len(passage.tokens)
    for begin in range(0, total, step):
        end = min(begin + room, total)
        first = max(done, begin + 1 - begins)
        if first < end:
            yield Window(passage.begin + passage.tokens[begin:end], begins + first - begin)
        done = max(done, end)
        if end == total:
            return


def batches(unbatched: Sequence[Window], *, most_tokens: int, most_logits: int) -> Iterator[list[Window]]:
    """Groups windows into batches, the largest first.

    A batch has at most `most_tokens` with its padding, and `most_logits` places whose logits are kept; a larger window
    is a batch of its own.
    """
    batch: list[Window] = []
    for window in sorted(unbatched, key=lambda each: (len(each.tokens), each.scored), reverse=True):
        together = [*batch, window]
        width = len(together[0].tokens)
        kept = width - min(each.first for each in together)
        if batch and (len(together) * width > most_tokens or len(together) * kept > most_logits):
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch
