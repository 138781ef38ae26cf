"""The arguments of from_pretrained: the dtype of unquantized weights, and the quantization config of the others.

Every option of a quantization is honoured here or refused by name, once the device is known. It loads nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import has_avx512bf16
from transformers import BitsAndBytesConfig

from batchmill.jobs.models.quantization import Kind, Quantization
from batchmill.jobs.models.spec import ModelSpec
from batchmill.worker.models.quantization.checkpoint import BITSANDBYTES_4BIT, BITSANDBYTES_8BIT, Checkpoint
from batchmill.worker.models.quantization.layers import kept
from batchmill.worker.models.vetting import Refusal


def pretrained_arguments(
    spec: ModelSpec, config: Any, folder: Path, device: torch.device, *, offloads: bool = False
) -> dict[str, Any]:
    """Returns the arguments of from_pretrained for a folder's weights as the spec asks for them.

    `config` is the folder's; for a checkpoint that is quantized already, its quantization_config is completed.
    `offloads`: some layers will lie on a CPU beside a GPU. Raises Refusal.
    """
    quantization = spec.quantization
    checkpoint = Checkpoint.of(config)
    if quantization.kind is Kind.CHECKPOINT:
        if checkpoint is None:
            raise Refusal("its config.json says of no quantization; choose -q nf4, fp4, int8 or none")
        return _of_checkpoint(checkpoint, config, folder, device)
    if checkpoint is not None:
        raise Refusal(f"its checkpoint is quantized already ({checkpoint.method}); take it as it is with -q checkpoint")
    if quantization.kind is Kind.NONE:
        return {"dtype": _plain_dtype(quantization.dtype, config, device)}
    kept_modules = kept(config, quantization.skip_modules)
    if quantization.kind is Kind.INT8:
        if quantization.fp32_cpu_offload and not offloads:
            raise Refusal(
                "-q int8:fp32_cpu_offload=true is about layers on the CPU beside others on a GPU, and here are none; "
                "leave it out, or ask for --offload cpu"
            )
        return {"dtype": half(device), "quantization_config": _eight_bit(quantization, kept_modules)}
    dtype = compute_dtype(quantization.compute_dtype, device)
    return {"dtype": dtype, "quantization_config": _four_bit(quantization, dtype, kept_modules)}


def half(device: torch.device) -> torch.dtype:
    """The dtype of plain weights beside 8-bit ones: 16 bits as the GPU can, float32 on a CPU."""
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if _has_bfloat16(device) else torch.float16


def compute_dtype(written: str, device: torch.device) -> torch.dtype:
    """The dtype that 4-bit weights are multiplied in, and that of plain weights beside them.

    bfloat16 stands for the best of the device's: float16 on a GPU without it, and float32 on a CPU whose products of
    4-bit weights are not in bfloat16.
    """
    if written != "bfloat16":
        dtype: torch.dtype = getattr(torch, written)
        return dtype
    return torch.bfloat16 if device.type == "cpu" and has_avx512bf16() else half(device)


def _has_bfloat16(device: torch.device) -> bool:
    if not torch.cuda.is_available():
        return True  # a plan for a GPU that is not here: all newer ones have it
    with torch.cuda.device(device):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def _plain_dtype(written: str | None, config: Any, device: torch.device) -> torch.dtype | str:
    """The dtype of weights that nobody quantizes: as asked, float32 on a CPU, as stored on a GPU that can."""
    if written is not None:
        if written == "bfloat16" and device.type == "cuda" and not _has_bfloat16(device):
            raise Refusal("this GPU has no bfloat16; use -q none:dtype=float16")
        dtype: torch.dtype = getattr(torch, written)
        return dtype
    if device.type == "cpu":
        return torch.float32
    return _stored_dtype(config, device)


def _stored_dtype(config: Any, device: torch.device) -> torch.dtype | str:
    """The dtype as stored, which transformers finds out; but float16 for bfloat16 on a GPU without it."""
    stored = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    if device.type == "cuda" and stored == torch.bfloat16 and not _has_bfloat16(device):
        return torch.float16
    return "auto"


def _eight_bit(quantization: Quantization, kept_modules: list[str] | None) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_8bit=True,
        llm_int8_threshold=quantization.threshold,
        llm_int8_skip_modules=kept_modules,
        llm_int8_enable_fp32_cpu_offload=quantization.fp32_cpu_offload,
    )


def _four_bit(quantization: Quantization, dtype: torch.dtype, kept_modules: list[str] | None) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.kind.value,
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=kept_modules,
    )


def _of_checkpoint(checkpoint: Checkpoint, config: Any, folder: Path, device: torch.device) -> dict[str, Any]:
    """The arguments for a quantized checkpoint: plain weights beside bitsandbytes' are as if it were quantized here."""
    checkpoint.refuse(folder, device)
    changes = checkpoint.changes(device)
    dtype: torch.dtype | str
    if checkpoint.method == BITSANDBYTES_4BIT:
        written = str(checkpoint.written.get("bnb_4bit_compute_dtype") or "float32")
        dtype = compute_dtype(written.removeprefix("torch."), device)
        changes |= {"bnb_4bit_compute_dtype": str(dtype).removeprefix("torch.")}
    elif checkpoint.method == BITSANDBYTES_8BIT:
        dtype = half(device)
    else:
        dtype = _plain_dtype(None, config, device) if "dequantize" in changes else _stored_dtype(config, device)
    config.quantization_config = dict(checkpoint.written) | changes
    return {"dtype": dtype}
