"""The quantizations of a model that a plan looks at, from the most precise to the one that changes most.

Owns that order: rounding to 16 bits changes least; LLM.int8() keeps 8 bits a weight and outliers apart; of 4 bits
NormalFloat loses less than plain floats, and scales that are quantized too lose a little more. What each costs
on a user's own text is measured by `batchmill evaluate`.
"""

from __future__ import annotations

from batchmill.jobs.models.quantization import Kind, Quantization
from batchmill.worker.models.quantization.checkpoint import Checkpoint

_OF_PLAIN_WEIGHTS = tuple(
    Quantization.parse(each) for each in ("none", "none:dtype=bfloat16", "int8", "nf4:double_quant=false", "nf4", "fp4")
)


def choices(config: object) -> tuple[Quantization, ...]:
    """Returns the quantizations that this model's configuration allows, most precise first.

    A checkpoint that is quantized already is taken as it is. `none` in bfloat16 differs from `none` where that is
    wider.
    """
    if Checkpoint.of(config) is not None:
        return (Quantization(Kind.CHECKPOINT),)
    return _OF_PLAIN_WEIGHTS
