"""The times of a run's tokens, and what follows from them: how long prompts were read, and how fast rows decode.

The computation is the same for every contestant. It knows no engine and no clock.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Timeline:
    """`times`: for each request, the seconds from the run's begin to each of its tokens, one at least.

    `held_bytes`: what its device holds, by kind; `peak_bytes`: the most that it held during the run, 0 where nobody
    counts. `notes`: how it was run, by heading.
    """

    times: Sequence[Sequence[float]]
    peak_bytes: int = 0
    held_bytes: Mapping[str, int] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)

    @property
    def prefill_seconds(self) -> float:
        """Until the last request had its first token."""
        return max(each[0] for each in self.times)

    @property
    def decode_seconds(self) -> float:
        """From then until the first request had its last token: all rows decode. 0 where that was never so."""
        return max(0.0, min(each[-1] for each in self.times) - self.prefill_seconds)

    @property
    def decode_tokens(self) -> int:
        """Tokens that came meanwhile."""
        begin = self.prefill_seconds
        end = begin + self.decode_seconds
        return sum(begin < time <= end for each in self.times for time in each)

    @property
    def decode_tokens_per_second(self) -> float | None:
        """None where the rows never decoded all at once."""
        return self.decode_tokens / self.decode_seconds if self.decode_tokens else None
