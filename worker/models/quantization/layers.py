"""The linear layers of a loaded model: those that stay as trained, and the dtype that 4-bit ones compute in.

Owns the corrections of layers where the libraries would silently do otherwise. It knows no spec and no file.
"""

from __future__ import annotations

import io
from collections.abc import Collection, Iterator
from contextlib import redirect_stderr
from typing import Any

import torch
from accelerate import init_empty_weights
from bitsandbytes.nn import Int8Params, Linear4bit, Params4bit
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert

from batchmill.worker.models.vetting import Refusal

#: bitsandbytes' fused kernel on a CPU takes a multiple of so many outputs, and of a block's inputs.
_FUSED_OUTPUTS = 32
_SHOWN = 5


def kept(config: Any, names: Collection[str]) -> list[str] | None:
    """Lists the layers that are not quantized: those within modules of these names, and those that never are.

    A name is a module's, whole or from any of its dots on. transformers forgets the layers that never are when it is
    given a list, so they are in it; None leaves them to transformers. Raises Refusal for a name without a layer.
    """
    if not names:
        return None
    with init_empty_weights(include_buffers=True):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    layers = [name for name, each in model.named_modules() if isinstance(each, nn.Linear | Conv1D)]
    skipped = set(get_keys_to_not_convert(model))
    for name in names:
        within = [each for each in layers if f".{name}." in f".{each}."]
        if not within:
            raise Refusal(f"skip_modules={name}: the model has no such linear layer; it has {_examples(layers)}")
        skipped.update(within)
    return sorted(skipped)


def _examples(layers: list[str]) -> str:
    """Lists last parts of names, each once."""
    parts = list(dict.fromkeys(each.rsplit(".", 1)[-1] for each in layers))
    return ", ".join(parts[:_SHOWN] + ["..."] * (len(parts) > _SHOWN))


def refuse_missing(missing: Collection[str]) -> None:
    """Raises Refusal for weights that the files lack: transformers would go on with random ones."""
    if missing:
        raise Refusal(
            f"its files lack {len(missing)} of its weights, such as {min(missing)}; they are no whole checkpoint of "
            "this architecture: copy or fetch it again"
        )


def finish(model: PreTrainedModel, dtype: torch.dtype | str) -> None:
    """Prepares the loaded layers for their first forward. `dtype`: the dtype of plain weights."""
    if isinstance(dtype, torch.dtype) and getattr(model, "quantization_method", None) == "bitsandbytes":
        _cast(model, dtype)
    for layer in _unfused(model):
        layer.support_avx512bf16_for_cpu = False
    if hasattr(model, "ct_decompress_hook"):
        _decompress(model)


def refuse_ignored(model: PreTrainedModel) -> None:
    """After the first forward: raises Refusal where bitsandbytes took a kernel in another dtype than it was told."""
    for layer in _unfused(model):
        if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
            raise Refusal(
                f"this bitsandbytes multiplies 4-bit weights in bfloat16 on this CPU, not in {layer.compute_dtype}; "
                "leave compute_dtype out, or install bitsandbytes 0.50"
            )


def _unfused(model: PreTrainedModel) -> Iterator[Any]:
    """4-bit layers on a CPU that bitsandbytes' fused kernel would get wrong: it computes in bfloat16, whole blocks.

    Without it they are dequantized for each product, in their compute_dtype.
    """
    for layer in model.modules():
        if isinstance(layer, Linear4bit) and layer.weight.device.type == "cpu":
            block = layer.weight.quant_state.blocksize
            whole = layer.out_features % _FUSED_OUTPUTS == 0 and layer.in_features % block == 0
            if layer.compute_dtype != torch.bfloat16 or not whole:
                yield layer


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Casts the plain weights of a checkpoint that bitsandbytes quantized: transformers leaves them in their dtype."""
    as_they_are = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    for name, weight in model.named_parameters():
        quantized = isinstance(weight, Params4bit | Int8Params)
        if weight.is_floating_point() and not quantized and as_they_are.isdisjoint(name.split(".")):
            weight.data = weight.data.to(dtype)


def _decompress(model: PreTrainedModel) -> None:
    """Makes compressed-tensors' weights plain now, and not in the first forward; activations stay as they are."""
    with redirect_stderr(io.StringIO()):  # progress bars, which nothing else turns off
        model.hf_quantizer.compressor.decompress_model(model)
    for layer in model.modules():
        if hasattr(layer, "quantization_scheme"):
            vars(layer).pop("forward", None)
