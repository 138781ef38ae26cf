"""A tiny random Llama with a tokenizer of bytes, made in a folder: what tests load instead of a real model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<s>", "</s>", "<pad>", "<|end|>")
CONTEXT_TOKENS = 128
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {{- raise_exception("no role '" ~ message.role ~ "' here") }}
    {%- endif %}
    {%- if message.content == 'refuse me' %}
        {{- raise_exception("I will not read " ~ message.content) }}
    {%- endif %}
    {{- '[' ~ message.role ~ ']' ~ message.content + (suffix | default('')) }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '[assistant]' }}{%- endif %}
"""


def build_tokenizer(*, chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """One token a byte; `<s>` goes in front of plain text."""
    tokens = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=[]))
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", SPECIAL_TOKENS.index("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=chat_template,
    )


def save_tiny_model(
    folder: Path, *, generation: dict[str, Any] | None = None, chat_template: str | None = CHAT_TEMPLATE
) -> Path:
    """Writes model, tokenizer and generation_config.json; the same weights every time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(SPECIAL_TOKENS) + 256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT_TOKENS,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    build_tokenizer(chat_template=chat_template).save_pretrained(folder)
    asked = generation if generation is not None else {"eos_token_id": [1, 3]}
    (folder / "generation_config.json").write_text(json.dumps(asked))
    return folder
