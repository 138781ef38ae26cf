"""The tokens that a loaded model answers with numbers; a model without any is refused before it answers anyone."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from batchmill.worker.models.vetting import Refusal

#: Tokens that are tried, spread over the vocabulary: a model may be without numbers for tokens that nobody trained.
_TRIED_TOKENS = 16


def refuse_without_numbers(model: PreTrainedModel, vocabulary: int, device: torch.device) -> None:
    """Raises Refusal for a model whose logits are NaN or infinite whatever it is asked."""
    if not sound_tokens(model, vocabulary, device):
        raise Refusal(
            f"its logits are not numbers (NaN or infinite) for any of {min(_TRIED_TOKENS, vocabulary)} tokens: its "
            f"weights are damaged, or too large for {str(model.dtype).removeprefix('torch.')}; copy or fetch it again, "
            "or choose another quantization or dtype"
        )


@torch.inference_mode()
def sound_tokens(model: PreTrainedModel, vocabulary: int, device: torch.device) -> list[int]:
    """Tries some tokens as prompts of their own. Returns those after which the largest logit is a number."""
    tried = torch.arange(0, vocabulary, -(-vocabulary // _TRIED_TOKENS), device=device)
    logits = model(input_ids=tried[:, None], use_cache=False).logits[:, -1]
    sound: list[int] = tried[logits.amax(dim=-1).isfinite()].tolist()
    return sound
