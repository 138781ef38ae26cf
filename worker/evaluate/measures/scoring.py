"""A model's next-token distributions at the scored tokens of windows, a bounded piece at a time.

Owns the forward passes and what they hold: logits are made for scored places alone, and turned into float32 in
pieces. It compares no distributions.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from batchmill.worker.evaluate.data.windows import Window, batches
from batchmill.worker.models.load import LoadedModel

#: Tokens of one forward.
CPU_TOKENS, CUDA_TOKENS = 2_048, 8_192
#: Logits of one forward, unless a single window has more; and the float32 distributions made of them at once.
LOGITS_BYTES = 256 * 1024**2
PIECE_BYTES = 64 * 1024**2
_FLOAT32_BYTES = 4


def scored(loaded: LoadedModel, windows: Sequence[Window]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields pairs of log-probabilities, float32 [places, vocabulary], and the tokens that came, int64 [places].

    Natural logarithms. The order depends on the windows alone, so it is the same for every quantization.
    """
    row_bytes = _FLOAT32_BYTES * loaded.vocabulary
    most_tokens = CPU_TOKENS if loaded.device.type == "cpu" else CUDA_TOKENS
    for batch in batches(windows, most_tokens=most_tokens, most_logits=LOGITS_BYTES // row_bytes):
        yield from _scored(loaded, batch, most_places=max(1, PIECE_BYTES // row_bytes))


@torch.inference_mode()
def _scored(loaded: LoadedModel, batch: Sequence[Window], *, most_places: int) -> Iterator[tuple[Tensor, Tensor]]:
    width = max(len(each.tokens) for each in batch)
    begin = min(each.first for each in batch) - 1
    # Padding on the right of a row changes nothing of what a causal model says on its left.
    rows = [[*each.tokens, *[loaded.pad_token_id] * (width - len(each.tokens))] for each in batch]
    tokens = torch.tensor(rows, device=loaded.device)
    logits = _logits(loaded.model, tokens, torch.arange(begin, width - 1, device=loaded.device))
    places = [
        (row, place - 1 - begin, place)
        for row, each in enumerate(batch)
        for place in range(each.first, len(each.tokens))
    ]
    for piece in torch.split(torch.tensor(places, device=loaded.device), most_places):
        row, before, place = piece.unbind(1)
        yield logits[row, before].float().log_softmax(-1), tokens[row, place]


def _logits(model: PreTrainedModel, tokens: Tensor, places: Tensor) -> Tensor:
    """The logits, [rows, places, vocabulary], in the model's dtype."""
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        kept: Tensor = model(input_ids=tokens, use_cache=False, logits_to_keep=places).logits
        return kept
    whole: Tensor = model(input_ids=tokens, use_cache=False).logits
    return whole[:, places]
