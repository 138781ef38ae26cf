"""Quantization: one spelling for equal ones, and every mistake named."""

from __future__ import annotations

import pytest

from batchmill.jobs.errors import UsageError
from batchmill.jobs.models.quantization import Kind, Quantization


@pytest.mark.parametrize(
    ("written", "canonical"),
    [
        ("nf4", "nf4"),
        ("nf4:double_quant=true,compute_dtype=bfloat16", "nf4"),
        ("nf4:double_quant=false,compute_dtype=float16", "nf4:compute_dtype=float16,double_quant=false"),
        ("fp4:skip_modules=b.c+a+a", "fp4:skip_modules=a+b.c"),
        ("int8:threshold=6", "int8"),
        ("int8:threshold=-0.0", "int8:threshold=0"),
        ("int8:threshold=0.1,fp32_cpu_offload=true", "int8:fp32_cpu_offload=true,threshold=0.1"),
        ("none:dtype=float16", "none:dtype=float16"),
        ("checkpoint", "checkpoint"),
    ],
)
def test_what_means_the_same_is_spelled_the_same(written: str, canonical: str) -> None:
    assert Quantization.parse(written).canonical == canonical
    assert Quantization.parse(canonical) == Quantization.parse(written)


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("nf5", "unknown quantization 'nf5'; choose one of nf4, fp4, int8, none, checkpoint"),
        ("nf4:", "no options are written after the colon"),
        ("nf4:fast", "'fast' is no option; write NAME=VALUE, such as double_quant=false"),
        ("nf4:speed=1", "has no option 'speed'; nf4 takes compute_dtype, double_quant, skip_modules"),
        ("nf4:threshold=0", "takes no threshold, which goes with int8; nf4 takes"),
        ("checkpoint:dtype=float16", "takes no dtype, which goes with none; checkpoint takes no options"),
        ("nf4:double_quant=yes", "double_quant takes true or false, not 'yes'"),
        ("nf4:compute_dtype=fp16", "compute_dtype takes bfloat16, float16 or float32, not 'fp16'"),
        ("int8:threshold=-1", "threshold takes a number, 0 or larger, not '-1'"),
        ("int8:threshold=nan", "threshold takes a number, 0 or larger, not 'nan'"),
        ("int8:threshold=0,threshold=0", "threshold is written twice"),
        ("int8:skip_modules=a b", "skip_modules takes names of modules with + between them"),
    ],
)
def test_mistakes_are_named(written: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        Quantization.parse(written)
    assert said in str(caught.value)


def test_options_hold_what_is_written_or_else_the_default() -> None:
    asked = Quantization.parse("int8:threshold=0,skip_modules=lm_head")
    assert dict(asked.options) == {"fp32_cpu_offload": False, "skip_modules": ("lm_head",), "threshold": 0.0}
    assert (asked.threshold, asked.skip_modules, asked.fp32_cpu_offload) == (0.0, ("lm_head",), False)
    assert (Quantization().compute_dtype, Quantization().double_quant) == ("bfloat16", True)
    assert (Quantization(Kind.NONE).dtype, Quantization.parse("none:dtype=float32").dtype) == (None, "float32")
