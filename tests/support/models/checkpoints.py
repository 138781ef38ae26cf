"""Tiny models of four shapes, and checkpoints of them that others quantized: what `-q checkpoint` is given."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from tests.support.models.tiny import CONTEXT_TOKENS, SPECIAL_TOKENS, build_tokenizer

_VOCABULARY = len(SPECIAL_TOKENS) + 256
_TOKENS = {"vocab_size": _VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
_SIZES = _TOKENS | {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT_TOKENS,
    "initializer_range": 0.3,
}
#: Tied and untied heads, biases and none, transposed weights (GPT-2), a window (Mistral).
SHAPES: Mapping[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_SIZES, tie_word_embeddings=False),
    "qwen": lambda: Qwen2Config(**_SIZES, tie_word_embeddings=True),
    "gpt2": lambda: GPT2Config(
        **_TOKENS, n_embd=64, n_layer=2, n_head=4, n_positions=CONTEXT_TOKENS, initializer_range=0.3
    ),
    "mistral": lambda: MistralConfig(**_SIZES, sliding_window=16, tie_word_embeddings=False),
}
_FP8 = torch.float8_e4m3fn
_FP8_MAX = torch.finfo(_FP8).max
#: compressed-tensors' schemes: 4 bits in groups, 8 bits with 8-bit activations, FP8.
SCHEMES: Mapping[str, Mapping[str, Any]] = {
    "pack-quantized": {
        "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    },
    "int-quantized": {
        "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
        "input_activations": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True},
    },
    "float-quantized": {
        "weights": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"},
        "input_activations": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True},
    },
}


def save_shape(folder: Path, shape: str) -> Path:
    """Random weights in float32, biases included, the same every time."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(SHAPES[shape]())
    for name, each in model.named_parameters():
        if name.endswith(".bias"):
            nn.init.normal_(each)
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def save_bitsandbytes(source: Path, folder: Path, *, dtype: torch.dtype = torch.bfloat16, **asked: Any) -> Path:
    """As transformers itself saves it, quantized from weights in `dtype`; `asked` of BitsAndBytesConfig."""
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype, quantization_config=BitsAndBytesConfig(**asked), device_map={"": "cpu"}
    )
    model.save_pretrained(folder)
    return _with_tokenizer(source, folder)


def save_compressed(source: Path, folder: Path, groups: Mapping[str, str]) -> dict[str, Tensor]:
    """As compressed-tensors saves it. `groups`: a format of SCHEMES for layers whose names end so.

    Returns what the weights stand for.
    """
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    asked = QuantizationConfig(
        config_groups={
            ending: {"targets": [f"re:.*{ending}$"], "format": name, **SCHEMES[name]} for ending, name in groups.items()
        },
        ignore=["lm_head"],
        format=next(iter(groups.values())) if len(groups) == 1 else "mixed-precision",
        quantization_status="frozen",
    )
    meant = {}
    with redirect_stderr(io.StringIO()):  # its progress bars
        apply_quantization_config(model, asked)
        for name, layer in model.named_modules():
            scheme = getattr(layer, "quantization_scheme", None)
            if scheme is not None:
                layer.weight_scale.data, meant[f"{name}.weight"] = _rounded(layer.weight.data, scheme.weights)
        compressor = ModelCompressor.from_pretrained_model(model)
        compressor.compress_model(model)
        model.save_pretrained(folder)
    compressor.update_config(folder)
    _with_tokenizer(source, folder)
    return meant


def _rounded(weight: Tensor, asked: Any) -> tuple[Tensor, Tensor]:
    """The scales of a weight's groups, or of its rows, and the weight as its bits can say it."""
    grouped = weight.unflatten(-1, (-1, asked.group_size or weight.shape[-1]))
    most = _FP8_MAX if asked.type == "float" else 2 ** (asked.num_bits - 1) - 1
    scale = grouped.abs().amax(-1, keepdim=True) / most
    held = grouped / scale
    held = held.to(_FP8).float() if asked.type == "float" else held.round()
    return scale.squeeze(-1), (held * scale).flatten(-2)


def save_fp8(source: Path, folder: Path, *, block: int = 32) -> dict[str, Tensor]:
    """Linear layers in FP8 with a scale for each block, as DeepSeek writes it. Returns what the weights stand for."""
    shutil.copytree(source, folder)
    written, meant = {}, {}
    for name, weight in load_file(source / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            rows, columns = (-(-length // block) for length in weight.shape)
            padded = torch.zeros(rows * block, columns * block)
            padded[: weight.shape[0], : weight.shape[1]] = weight
            blocks = padded.unflatten(1, (columns, block)).unflatten(0, (rows, block))
            scale = blocks.abs().amax((1, 3)) / _FP8_MAX
            held = (blocks / scale[:, None, :, None]).to(_FP8)
            whole = (held.float() * scale[:, None, :, None]).flatten(2, 3).flatten(0, 1)
            written[name] = held.flatten(2, 3).flatten(0, 1)[: weight.shape[0], : weight.shape[1]].contiguous()
            written[f"{name}_scale_inv"] = scale
            meant[name] = whole[: weight.shape[0], : weight.shape[1]].contiguous()
        else:
            written[name] = meant[name] = weight
    save_file(written, folder / "model.safetensors", metadata={"format": "pt"})
    say(folder, quant_method="fp8", activation_scheme="dynamic", weight_block_size=[block, block])
    return meant


def say(folder: Path, **quantization: Any) -> Path:
    """Writes a quantization_config into the folder's config.json."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return folder


def _with_tokenizer(source: Path, folder: Path) -> Path:
    for each in source.glob("token*"):
        shutil.copy(each, folder)
    return folder
