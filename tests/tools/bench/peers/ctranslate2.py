"""CTranslate2 as a contestant: int8 weights, batches that it forms itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from tests.tools.bench.contestant import EXACT, Answers, Contestant
from tests.tools.bench.workloads import Workload


class Setting(NamedTuple):
    """Batches side by side, and the requests of each."""

    beside: int
    rows: int

    def __str__(self) -> str:
        return f"{self.beside} x {self.rows} rows"


class CTranslate2(Contestant):
    name: ClassVar[str] = "CTranslate2, each its limit"
    needs: ClassVar[tuple[str, ...]] = ("ctranslate2",)
    formats: ClassVar[Mapping[str, str]] = {"nf4": "int8", "int8": "int8", "none": "float32", EXACT: "float32"}

    @classmethod
    def prepare(cls, folder: Path, weights: str) -> None:
        from ctranslate2.converters import TransformersConverter

        target = _folder(folder, weights)
        if not target.exists():
            unfinished = target.with_suffix(".unfinished")
            TransformersConverter(str(folder)).convert(str(unfinished), quantization=weights, force=True)
            unfinished.rename(target)

    def load(self, folder: Path, weights: str, threads: int) -> None:
        import ctranslate2

        target = str(_folder(folder, weights))
        #: By how many batches run side by side.
        self._generators = {
            beside: ctranslate2.Generator(
                target, compute_type=weights, inter_threads=beside, intra_threads=threads // beside
            )
            for beside in {1, threads}
        }
        self._words: list[str] = json.loads((Path(target) / "vocabulary.json").read_text())

    def settings(self, workload: Workload) -> Sequence[Any]:
        return [Setting(beside, rows) for beside in self._generators for rows in (16, 32, 64)]

    def run(self, workload: Workload, setting: Setting) -> Answers:
        asks = workload.asks
        counts = [0] * len(asks)

        def ended(step: Any) -> bool:
            """Each request has a limit of its own, which CTranslate2 has no other word for."""
            counts[step.batch_id] += 1
            over: bool = counts[step.batch_id] >= asks[step.batch_id].answer_tokens
            return over

        return Answers.of(self._generate(workload, setting, ended))

    def _generate(
        self, workload: Workload, setting: Setting, callback: Callable[[Any], bool] | None
    ) -> list[list[int]]:
        asks, shared = workload.asks, workload.shared_tokens
        results = self._generators[setting.beside].generate_batch(
            [[self._words[token] for token in ask.tokens[shared:]] for ask in asks],
            static_prompt=[self._words[token] for token in asks[0].tokens[:shared]] or None,
            max_batch_size=setting.rows,
            max_length=max(ask.answer_tokens for ask in asks),
            end_token=[],
            include_prompt_in_result=False,
            callback=callback,
        )
        return [list(result.sequences_ids[0]) for result in results]


class OneLimitCTranslate2(CTranslate2):
    """Called plainly, with the largest limit for all; what is over a request's own is not counted."""

    name: ClassVar[str] = "CTranslate2, one limit for all"

    def run(self, workload: Workload, setting: Setting) -> Answers:
        rows = self._generate(workload, setting, None)
        return Answers.of([row[: ask.answer_tokens] for row, ask in zip(rows, workload.asks, strict=True)])


class UntunedCTranslate2(OneLimitCTranslate2):
    """One batch after the other, with as many threads as there are."""

    name: ClassVar[str] = "CTranslate2, as it comes"

    def settings(self, workload: Workload) -> Sequence[Any]:
        return [Setting(1, 64)]


def _folder(folder: Path, weights: str) -> Path:
    return folder / f"ctranslate2-{weights}"
