"""What transformers is asked for: the dtype of what is not quantized, and how the rest is.

It knows what a device can compute in, and loads nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.functional import has_avx512bf16
from transformers import BitsAndBytesConfig

from jobs.errors import ModelError
from jobs.quantization import Kind
from jobs.spec import ModelSpec


def precision(spec: ModelSpec, config: Any, device: torch.device) -> dict[str, Any]:
    """The dtype of what is not quantized, and how the rest is.

    A CPU computes in float32, but around 4-bit weights in bfloat16 where its products of them do. On CUDA an
    unquantized model keeps its checkpoint's dtype, and a quantized one has bfloat16 around its weights, or float16
    where the GPU has no bfloat16.
    """
    written = getattr(config, "quantization_config", None)
    if device.type == "cpu":
        fused = spec.quantization.four_bit and has_avx512bf16()
        half = torch.bfloat16 if fused else torch.float32
    else:
        half = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if spec.quantization.kind is Kind.NONE:
        return {"dtype": half if device.type == "cpu" else "auto"}
    if written is not None:
        method = written.get("quant_method", "unknown") if isinstance(written, dict) else written.quant_method
        raise ModelError(
            f"cannot load {spec}: its checkpoint is quantized already ({method}); take it as it is with -q none"
        )
    if spec.quantization.kind is Kind.INT8:
        eight_bit = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=spec.quantization.threshold)
        return {"dtype": half, "quantization_config": eight_bit}
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=spec.quantization.kind.value,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=half,
    )
    return {"dtype": half, "quantization_config": four_bit}
