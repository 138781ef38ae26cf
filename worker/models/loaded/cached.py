"""The bytes of one token in transformers' own cache, also of a model that has no weights."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel


@torch.no_grad()
def cache_token_bytes(model: PreTrainedModel, device: torch.device) -> int:
    """Runs a forward of one token on this device, and returns the bytes of its cache, 1 at least."""
    output = model(input_ids=torch.zeros((1, 1), dtype=torch.long, device=device), use_cache=True)
    layers = getattr(output.get("past_key_values"), "layers", ())
    held = (each for layer in layers for each in vars(layer).values() if isinstance(each, torch.Tensor))
    return max(1, sum(each.nbytes for each in held))
