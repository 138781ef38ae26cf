"""Compares a peer's greedy tokens with those of transformers' `generate`, in exact formats: is it the same model?"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from tests.tools.bench.contest import Contest, Kind
from tests.tools.bench.contestant import EXACT
from tests.tools.bench.peers.transformers import OneByOneGenerate
from tests.tools.bench.workloads import workload

_ASKS = 8
_ANSWER_TOKENS = 16


class Agreement:
    """`folder` holds the checkpoint."""

    def __init__(self, folder: Path, *, threads: int) -> None:
        self._folder, self._threads = folder, threads

    def of(self, kinds: Sequence[Kind], name: str) -> dict[str, str] | None:
        """For each contestant how many tokens of the first requests of a workload come before the first other one, or
        why there are none; None where the model's context is too short for the workload."""
        asked = workload(name, self._folder, large=True)
        if asked is None:
            return None
        asks = tuple(replace(ask, answer_tokens=_ANSWER_TOKENS) for ask in asked.asks[:_ASKS])
        with closing(Contest(self._folder, EXACT, threads=self._threads, rounds=1)) as contest:
            reference, *others = contest.measure([OneByOneGenerate, *kinds], replace(asked, asks=asks))
        if not reference.runs:
            raise SystemExit(f"bench: {reference.failed}")
        expected = reference.runs[0].answers.tokens or []
        return {
            f"{entry.kind.name}, {entry.weights}": entry.failed or _same(expected, entry.runs[0].answers.tokens or [])
            for entry in others
        }


def _same(expected: Sequence[Sequence[int]], found: Sequence[Sequence[int]]) -> str:
    equal = total = 0
    for wanted, row in zip(expected, found, strict=True):
        differ = [place for place, pair in enumerate(zip(wanted, row, strict=True)) if pair[0] != pair[1]]
        equal += differ[0] if differ else len(wanted)
        total += len(wanted)
    return f"{equal} of {total} tokens"
