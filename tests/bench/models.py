"""The models that are measured: Llamas of random weights, and the bundled one.

Owns their shapes and their folders. It knows no engine; what a peer converts of a model lies beside it.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from worker.loader.source import DEMO_FOLDER

_SEED = 7
_CONTEXT_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama with heads of 64 wide, some of which share keys and values."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int


#: 42, 250 and 960 million parameters in the blocks. None is the bundled model.
SHAPES: dict[str, Shape | None] = {
    "demo": None,
    "45m": Shape(hidden=640, intermediate=1792, layers=9, heads=10, kv_heads=5),
    "250m": Shape(hidden=1280, intermediate=3584, layers=14, heads=20, kv_heads=5),
    "1b": Shape(hidden=2048, intermediate=5632, layers=21, heads=32, kv_heads=8),
}


def checkpoint(root: Path, name: str, *, vocabulary: int | None = None) -> Path:
    """The folder under `root` that holds this model in bfloat16; it is made where it is missing.

    `vocabulary`: tokens of a model of random weights; None for those of the bundled one's tokenizer, which spells
    letter by letter. A larger one has made words on top.
    """
    folder = root / (name if vocabulary is None else f"{name}-{vocabulary}")
    if not folder.exists():
        unfinished = folder.with_suffix(".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        shape = SHAPES[name]
        if shape is None:
            shutil.copytree(DEMO_FOLDER, unfinished)
        else:
            _make(unfinished, shape, vocabulary)
        unfinished.rename(folder)
    return folder


def _make(folder: Path, shape: Shape, vocabulary: int | None) -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO_FOLDER)
    smallest = json.loads((DEMO_FOLDER / "config.json").read_text())["vocab_size"]
    size = smallest if vocabulary is None else vocabulary
    if size > smallest:
        tokenizer.add_tokens([f"w{number:06}." for number in range(size - len(tokenizer))])
    tokenizer.save_pretrained(folder)
    torch.manual_seed(_SEED)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=_CONTEXT_TOKENS,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
