"""Tiny random models of many families, as a worker loads them: float32, on the CPU, with a tokenizer of bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GenerationConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from batchmill.jobs.models.identity import Content
from batchmill.jobs.models.quantization import Kind, Quantization
from batchmill.jobs.models.spec import ModelSpec
from batchmill.jobs.requests.generation import SamplingParams
from batchmill.worker.models.load import LoadedModel
from tests.support.models.tiny import SPECIAL_TOKENS, build_tokenizer

CONTEXT_TOKENS = 256
WINDOW_TOKENS = 16
VOCABULARY = len(SPECIAL_TOKENS) + 256
END_TOKEN = SPECIAL_TOKENS.index("</s>")
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT_TOKENS,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_GROUPED = _SIZES | {"num_key_value_heads": 2, "head_dim": 12}
_WINDOW = _GROUPED | {"sliding_window": WINDOW_TOKENS}

FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_SIZES, num_key_value_heads=4),
    "llama-grouped": lambda: LlamaConfig(**_GROUPED),
    "mistral": lambda: MistralConfig(**_WINDOW),
    "qwen2": lambda: Qwen2Config(**_WINDOW, use_sliding_window=True, max_window_layers=1),
    "qwen3": lambda: Qwen3Config(**_GROUPED),
    "gemma2": lambda: Gemma2Config(**_WINDOW, query_pre_attn_scalar=12, attn_logit_softcapping=5.0),
    "gemma3": lambda: Gemma3TextConfig(**_WINDOW, layer_types=["sliding_attention", "full_attention"]),
    "phi3": lambda: Phi3Config(**_SIZES, num_key_value_heads=2),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY, n_positions=CONTEXT_TOKENS, n_embd=48, n_layer=2, n_head=4, initializer_range=0.3,
        bos_token_id=0, eos_token_id=1, pad_token_id=2,
    ),
    "gpt-neox": lambda: GPTNeoXConfig(**_SIZES),
    "olmo2": lambda: Olmo2Config(**_GROUPED),
}  # fmt: skip


def load_family(name: str) -> LoadedModel:
    """The same weights every time."""
    return loaded(FAMILIES[name]())


def loaded(config: PreTrainedConfig) -> LoadedModel:
    """A model of this configuration, with random weights."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config = GenerationConfig()
    return LoadedModel(
        spec=ModelSpec("/random", quantization=Quantization(Kind.NONE)),
        model=model,
        tokenizer=build_tokenizer(),
        device=torch.device("cpu"),
        defaults=SamplingParams(),
        end_token_ids=(END_TOKEN,),
        pad_token_id=2,
        context_tokens=CONTEXT_TOKENS,
        vocabulary=VOCABULARY,
        cache_token_bytes=1024,
        weights_bytes=0,
        load_seconds=0.0,
        commit=None,
        content=Content("random"),
    )


def load_alphabet() -> LoadedModel:
    """A model that answers with the next byte: after "a" comes "b", after "}" "~", and after that an end token."""
    size = 2 * VOCABULARY
    model = loaded(
        LlamaConfig(**_SIZES | {"hidden_size": size, "num_hidden_layers": 1, "num_key_value_heads": 4}, head_dim=4)
    )
    module: Any = model.model
    tokens = [model.tokenizer.convert_tokens_to_ids(chr(byte)) for byte in range(ord("!"), ord("~") + 1)]
    with torch.no_grad():
        for layer in module.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        module.model.embed_tokens.weight.copy_(torch.eye(VOCABULARY, size))
        module.lm_head.weight.zero_()
        for token, following in zip(tokens, [*tokens[1:], END_TOKEN], strict=True):
            module.lm_head.weight[following, token] = 1.0
    return model
