"""The score of one contestant with so many rows of one model, and the table of many such scores.

Owns medians, shares of floors and the columns. It measures nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median

from batchmill.jobs.runtime.sizes import size
from batchmill.worker.plan.hardware import Hardware
from tests.tools.bench.floor import Floor
from tests.tools.bench.report import aligned, rate
from tests.tools.bench.timeline import Timeline

_UNKNOWN = "-"
_HEAD = (
    "model", "quantization", "rows", "", "decode tokens/s", "least - most", "of the floor", "of the data sheet's",
    "first / this", "prompt tokens/s", "of the floor", "peak", "weights", "copies", "cache", "rest", "dequantize",
    "CUDA graphs", "joined",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Ground:
    """The device that scores are measured against."""

    #: Its rates by the data sheet.
    sheet: Hardware
    #: Its rates as measured.
    measured: Hardware
    context_tokens: int


@dataclass(slots=True)
class Score:
    """The rounds of one contestant with so many rows."""

    model: str
    quantization: str
    rows: int
    name: str
    floor: Floor | None = None
    #: One timeline a round.
    decodes: list[Timeline] = field(default_factory=list)
    #: One timeline a round.
    prefills: list[Timeline] = field(default_factory=list)
    #: Prompt tokens that each of `prefills` reads.
    prompt_tokens: int = 0
    #: The score whose decoding rate this one is compared with.
    best: Score | None = None
    #: The reason why there are no rounds, or no more.
    failed: str | None = None

    @property
    def rates(self) -> list[float]:
        """Decoded tokens a second, of each round in which all rows decoded at once."""
        return [found for each in self.decodes if (found := each.decode_tokens_per_second)]

    @property
    def decode(self) -> float | None:
        return median(self.rates) if self.rates else None

    @property
    def prefill(self) -> float | None:
        """Prompt tokens a second."""
        return self.prompt_tokens / median(each.prefill_seconds for each in self.prefills) if self.prefills else None

    @property
    def copied(self) -> bool:
        """True where 4-bit weights have copies of full precision."""
        return bool(self.decodes and self.decodes[-1].held_bytes.get("copies"))


def table(scores: Sequence[Score], ground: Ground) -> str:
    """The columns that say nothing of any score are left out."""
    rows = [_HEAD, *(_cells(each, ground) for each in scores)]
    told = [any(cell not in ("", _UNKNOWN) for cell in column[1:]) for column in zip(*rows, strict=True)]
    return "\n".join([*aligned([tuple(_kept(row, told)) for row in rows]), ""])


def _kept(row: Sequence[str], told: Sequence[bool]) -> Iterable[str]:
    return (cell for cell, each in zip(row, told, strict=True) if each)


def _cells(score: Score, ground: Ground) -> tuple[str, ...]:
    begin = (score.model, score.quantization, str(score.rows), score.name)
    if score.decode is None:
        why = score.failed or "its rows never decoded all at once"
        return (*begin, why, *[""] * 4, *_prefill(score, ground), *_memory(score, ground), *_notes(score))
    shares = [_share(score.decode, _floor(score, hardware, ground)) for hardware in (ground.measured, ground.sheet)]
    if ground.sheet is ground.measured:
        shares[1] = ""
    ratio = f"{score.best.decode / score.decode:.2f}" if score.best is not None and score.best.decode else ""
    span = f"{rate(min(score.rates))} - {rate(max(score.rates))}" if len(score.rates) > 1 else ""
    cells = (rate(score.decode), span, *shares, ratio)
    return (*begin, *cells, *_prefill(score, ground), *_memory(score, ground), *_notes(score))


def _prefill(score: Score, ground: Ground) -> tuple[str, str]:
    if score.prefill is None:
        return "", ""
    floor = score.floor.prefill(ground.measured) if score.floor is not None else None
    return rate(score.prefill), _share(score.prefill, floor)


def _floor(score: Score, hardware: Hardware, ground: Ground) -> float | None:
    if score.floor is None:
        return None
    return score.floor.decode(hardware, rows=score.rows, context_tokens=ground.context_tokens, copied=score.copied)


def _share(found: float, floor: float | None) -> str:
    return f"{found / floor:.0%}" if floor else _UNKNOWN


def _memory(score: Score, ground: Ground) -> tuple[str, ...]:
    """The peak, and what of it is known; on a GPU the rest is a step's own buffers. A CPU tells no weights apart."""
    runs = [*score.prefills, *score.decodes]
    if not runs:
        return ("",) * 5
    held, peak = runs[-1].held_bytes, max(each.peak_bytes for each in runs)
    weights, copies, cache = (size(held[kind]) if held.get(kind) else "" for kind in ("weights", "copies", "cache"))
    if not ground.sheet.cuda:
        return size(peak), "", copies, cache, ""
    return size(peak), weights, copies, cache, size(peak - sum(held.values())) if held else ""


def _notes(score: Score) -> tuple[str, ...]:
    notes = score.decodes[-1].notes if score.decodes else {}
    return tuple(notes.get(name, "") for name in _HEAD[-3:])
