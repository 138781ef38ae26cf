"""A Llama checkpoint becomes a GGUF file, quantized by llama.cpp itself.

Owns the file's names and their order of rows. It knows no request; tokens come and go as numbers, so the file holds
no vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np


def gguf_file(folder: Path, weights: str) -> Path:
    """Returns the path of a folder's model in this format."""
    return folder / f"llama-{weights}.gguf"


def write(folder: Path, weights: str) -> None:
    """Makes the file where it is missing: `F32`, or one of `BF16`, `Q8_0` and `Q4_0`, as llama-quantize makes them."""
    exact, target = gguf_file(folder, "F32"), gguf_file(folder, weights)
    if not exact.exists():
        unfinished = exact.with_suffix(".unfinished")
        _export(folder, unfinished)
        unfinished.rename(exact)
    if not target.exists():
        unfinished = target.with_suffix(".unfinished")
        _quantize(exact, unfinished, weights)
        unfinished.rename(target)


def _export(folder: Path, target: Path) -> None:
    import gguf
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    writer = gguf.GGUFWriter(target, "llama")
    _describe(writer, model.config)
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight" or not model.config.tie_word_embeddings:
            writer.add_tensor(_gguf_name(name), _rotary_pairs(name, tensor.numpy(), model.config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _describe(writer: Any, config: Any) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


_BLOCK_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OTHER_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def _gguf_name(name: str) -> str:
    if name in _OTHER_NAMES:
        return _OTHER_NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{_BLOCK_NAMES[rest.removesuffix('.weight')]}.weight"


def _rotary_pairs(name: str, weight: np.ndarray, config: Any) -> np.ndarray:
    """Rows of queries and keys in GGUF's order: transformers turns the halves of a head, llama.cpp neighbours."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for part, count in heads.items():
        if part in name:
            rows, columns = weight.shape
            halves = weight.reshape(count, 2, rows // count // 2, columns)
            return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows, columns)
    return weight


def _quantize(exact: Path, target: Path, weights: str) -> None:
    import ctypes

    import llama_cpp

    silence = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silence, ctypes.c_void_p(0))
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{weights}")
    failed = llama_cpp.llama_model_quantize(str(exact).encode(), str(target).encode(), ctypes.byref(parameters))
    if failed:
        raise RuntimeError(f"llama.cpp could not quantize to {weights}")
