"""The ModelSpecs that an evaluation compares, in the order in which they are loaded: the baseline first.

It knows spellings alone: no file, no model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from batchmill.jobs.errors import UsageError
from batchmill.jobs.models.spec import ECHO, ModelSpec


@dataclass(frozen=True, slots=True)
class Lineup:
    """The specs of one evaluation."""

    baseline: ModelSpec
    #: In the order in which they were asked for, each once, the baseline among them.
    specs: tuple[ModelSpec, ...]

    @classmethod
    def parse(cls, model: str, quantizations: Sequence[str], *, baseline: str, revision: str | None = None) -> Lineup:
        """Parses the specs of `["nf4,int8:threshold=0", "fp4"]`; a baseline that is not among them comes last.

        Raises UsageError for models and quantizations that do not exist.
        """
        if model == ECHO:
            raise UsageError("echo holds no weights, so there is nothing to evaluate")
        reference = ModelSpec.parse(model, quantization=baseline, revision=revision)
        written = [each for text in quantizations for each in split(text)]
        specs = [ModelSpec.parse(model, quantization=each, revision=revision) for each in written]
        return cls(reference, tuple(dict.fromkeys([*specs, reference])))

    @property
    def order(self) -> tuple[ModelSpec, ...]:
        """The specs as they are measured: the baseline first, since all others are compared with it."""
        return (self.baseline, *(each for each in self.specs if each != self.baseline))


def split(text: str) -> Iterator[str]:
    """Yields the quantizations of `nf4:compute_dtype=float16,double_quant=false,none`, whose options have commas, too.

    A part with an equals sign and no colon is one more option of the quantization before it.
    """
    held = ""
    for number, part in enumerate(text.split(",")):
        is_option = "=" in part and ":" not in part
        if number and not is_option:
            yield held
        held = f"{held},{part}" if number and is_option else part
    yield held
