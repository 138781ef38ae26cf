"""Configurations of models of well-known sizes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from batchmill.jobs.models.spec import ModelSpec
from batchmill.worker.plan.model import PlannedModel

SHAPES: Mapping[str, dict[str, Any]] = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
            "num_key_value_heads": 8},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256, "dtype": "bfloat16"},
}  # fmt: skip


def shape(folder: Path, name: str, **changes: Any) -> PlannedModel:
    """A configuration alone, of a size that nobody loads here."""
    LlamaConfig(**{"dtype": "float16", "max_position_embeddings": 4096} | SHAPES[name] | changes).save_pretrained(
        folder
    )
    return PlannedModel(ModelSpec(str(folder)), folder)
