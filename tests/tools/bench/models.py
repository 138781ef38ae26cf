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
from transformers.modeling_utils import local_torch_dtype

from batchmill.jobs.models.spec import DEMO_FOLDER

_SEED = 7
_CONTEXT_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama with heads of 64 or 128 wide, some of which share keys and values.

    `vocabulary`: tokens that have an embedding, None for those of the bundled model's tokenizer, which speaks in all of
    them. `tied`: the head is the embedding.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int | None = None
    tied: bool = False


#: 42, 250, 973 and 6,980 million parameters in the blocks; the last two are Llama-3.2-1B's and Llama-3.1-8B's shapes,
#: with vocabularies of 263 and 525 million more. None is the bundled model.
SHAPES: dict[str, Shape | None] = {
    "demo": None,
    "45m": Shape(hidden=640, intermediate=1792, layers=9, heads=10, kv_heads=5),
    "250m": Shape(hidden=1280, intermediate=3584, layers=14, heads=20, kv_heads=5),
    "1b": Shape(hidden=2048, intermediate=8192, layers=16, heads=32, kv_heads=8, vocabulary=128_256, tied=True),
    "8b": Shape(hidden=4096, intermediate=14_336, layers=32, heads=32, kv_heads=8, vocabulary=128_256),
}


def checkpoint(root: Path, name: str, *, vocabulary: int | None = None, device: str = "cpu") -> Path:
    """The folder under `root` that holds this model in bfloat16; it is made where it is missing.

    `vocabulary`: tokens of a model of random weights, whose tokenizer has made words for those that the bundled one's
    has not, which spells letter by letter; None for the shape's own, without words. `device`: where the weights are
    made: on a GPU in bfloat16, which takes seconds; on a CPU in float32, for which 8b is too large.
    """
    folder = root / (name if vocabulary is None else f"{name}-{vocabulary}")
    if not folder.exists():
        unfinished = folder.with_suffix(".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        shape = SHAPES[name]
        if shape is None:
            shutil.copytree(DEMO_FOLDER, unfinished)
        else:
            _make(unfinished, shape, vocabulary, device)
        unfinished.rename(folder)
    return folder


def _make(folder: Path, shape: Shape, vocabulary: int | None, device: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO_FOLDER)
    smallest = json.loads((DEMO_FOLDER / "config.json").read_text())["vocab_size"]
    if vocabulary is not None and vocabulary > smallest:
        tokenizer.add_tokens([f"w{number:06}." for number in range(vocabulary - len(tokenizer))])
    tokenizer.save_pretrained(folder)
    torch.manual_seed(_SEED)
    config = LlamaConfig(
        vocab_size=vocabulary or shape.vocabulary or smallest,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=_CONTEXT_TOKENS,
        tie_word_embeddings=shape.tied,
    )
    with torch.device(device), local_torch_dtype(torch.float32 if device == "cpu" else torch.bfloat16):
        model = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)
