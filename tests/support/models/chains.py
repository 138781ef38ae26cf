"""Tokenizers of other kinds than bytes, and a model whose next token follows from the last one alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import LlamaConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from batchmill.worker.models.load import LoadedModel
from tests.support.models.families import loaded
from tests.support.models.tiny import CHAT_TEMPLATE


def sentencepiece(*words: str) -> PreTrainedTokenizerFast:
    """Llama 2's shape: `▁` for a space, tokens of bytes, and no space where a text begins."""
    letters = [chr(each) for each in range(33, 127)]
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *letters, *words]
    tokens = {token: number for number, token in enumerate(dict.fromkeys(first))}
    merges: dict[tuple[str, str], None] = {}
    for word in words:
        for end in range(1, len(word)):
            tokens.setdefault(word[: end + 1], len(tokens))
            merges[word[:end], word[end]] = None
    backend = Tokenizer(models.BPE(tokens, list(merges), unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=CHAT_TEMPLATE
    )


def wordpieces() -> PreTrainedTokenizerFast:
    """Words and their ends, without bytes: a space stands between tokens that are no end."""
    tokens = {token: number for number, token in enumerate(["[UNK]", "</s>", "play", "##ing", "##ed", "now"])}
    backend = Tokenizer(models.WordPiece(tokens, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece(cleanup=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", eos_token="</s>")


def load_chain(
    tokenizer: PreTrainedTokenizerBase, *, nexts: Mapping[str | int, Sequence[str | int]], vocabulary: int | None = None
) -> LoadedModel:
    """A model for this tokenizer: after each token the likeliest follow, the first one first; else an end token.

    `vocabulary`: how many embeddings it has, as many as tokens where nothing else is said.
    """

    def number(token: str | int) -> int:
        return token if isinstance(token, int) else int(tokenizer.convert_tokens_to_ids(token))

    size = vocabulary or len(tokenizer)
    width = -(-size // 8) * 8
    sizes = {"vocab_size": size, "hidden_size": width, "intermediate_size": 16, "max_position_embeddings": 256}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 4}
    model = loaded(LlamaConfig(**sizes, **heads))
    following = {number(token): [number(each) for each in after] for token, after in nexts.items()}
    module: Any = model.model
    with torch.no_grad():
        for layer in module.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        module.model.embed_tokens.weight.copy_(torch.eye(size, width))
        module.lm_head.weight.zero_()
        for token in range(size):
            for place, each in enumerate(following.get(token, [number("</s>")])):
                module.lm_head.weight[each, token] = 1.0 - place / 10
    return replace(model, tokenizer=tokenizer, end_token_ids=(number("</s>"),), vocabulary=size)
