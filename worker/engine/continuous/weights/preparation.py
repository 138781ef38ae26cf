"""Lays out a loaded model's weights for speed: fused projections, and 4-bit weights with a copy for large steps.

Owns the choice of layers, by what they compute and never by a model's name, and takes back what changes a value. The
arithmetic is in `fused_matmul`, the order of calls in `fused_projections`. This module knows no request and no cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from batchmill.worker.engine.continuous.weights.fused_matmul import FusedMatmul, fused_matmul_of
from batchmill.worker.engine.continuous.weights.fused_projections import FusedProjections, find_shared_inputs
from batchmill.worker.engine.options import Dequantize

#: Rows of the inputs for which a product must equal its layers: one, few, a decode step, a prefill.
_ROWS = (1, 3, 64, 200)
#: Tokens of the prompts for which the whole model is compared.
_PROMPTS = (1, 7, 65)
_SEED = 20
#: Some columns of the inputs are large, since LLM.int8() treats outliers apart.
_OUTLIER_EVERY = 64
_OUTLIER = 8.0


@dataclass(frozen=True, slots=True)
class Prepared:
    """The changes to a model's linear layers."""

    #: Groups of layers that are computed in one product.
    joined: int = 0
    #: Single layers whose kernel is called without what bitsandbytes does around it.
    direct: int = 0
    #: Bytes of the copies of full precision beside 4-bit weights.
    copied_bytes: int = 0
    #: The tokens of a step from which on a copy is used: the least and the most of all layers, 0 for none.
    copy_rows: tuple[int, int] = (0, 0)


@torch.inference_mode()
def prepare(model: PreTrainedModel, *, dequantize: Dequantize, free_bytes: int) -> Prepared:
    """Changes how this model's linear layers are computed, and none of their values, except by `dequantize`.

    The model must have run once. `free_bytes`: what copies may take under `Dequantize.AUTO`, which makes all of them
    or none. Raises what the device raises when memory for a copy is short.
    """
    before = [_logits(model, tokens) for tokens in _PROMPTS]
    products = dict(_joined(find_shared_inputs(model, lambda: _logits(model, _PROMPTS[-1]))))
    if not all(torch.equal(_logits(model, tokens), logits) for tokens, logits in zip(_PROMPTS, before, strict=True)):
        for projections in products:
            projections.part()
        return Prepared()
    widths = [len(product.widths) for product in products.values()]
    return Prepared(
        sum(width > 1 for width in widths), widths.count(1), *_copied(list(products.values()), dequantize, free_bytes)
    )


def _logits(model: PreTrainedModel, tokens: int) -> Tensor:
    """The model's logits for a prompt of this many tokens: [1, tokens, vocabulary]."""
    ids = torch.arange(tokens, device=model.device).remainder(model.get_input_embeddings().num_embeddings)
    logits: Tensor = model(input_ids=ids[None], use_cache=False).logits
    return logits


def _joined(groups: Sequence[tuple[nn.Linear, ...]]) -> Iterator[tuple[FusedProjections, FusedMatmul]]:
    """Puts a product in place of each group's layers, or of each one alone where the group's would not be equal.

    What is equal depends on shapes and kinds, so of layers that are alike only the first are tried in full.
    """
    tried: set[tuple[object, ...]] = set()
    for group in groups:
        for layers in (group, *((each,) for each in group if len(group) > 1)):
            product = fused_matmul_of(layers)
            if product is None or any("forward" in vars(each) for each in layers):
                continue
            kind = tuple((type(each), each.in_features, each.out_features) for each in layers)
            if not _equal(layers, product, _ROWS[1:2] if kind in tried else _ROWS):
                continue
            tried.add(kind)
            product.adopt()
            projections = FusedProjections(layers, product)
            projections.join()
            yield projections, product


def _equal(layers: Sequence[nn.Linear], product: FusedMatmul, rows: Sequence[int]) -> bool:
    """True where the product's values are those of the layers, bit for bit."""
    weight = next(each for each in (layers[0].bias, layers[0].weight) if each is not None)
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    generator = torch.Generator().manual_seed(_SEED)
    for count in rows:
        x = torch.randn(1, count, layers[0].in_features, generator=generator).to(weight.device, dtype)
        x[..., ::_OUTLIER_EVERY] *= _OUTLIER
        if not torch.equal(torch.cat([each(x) for each in layers], -1), product(x)):
            return False
    return True


def _copied(products: Sequence[FusedMatmul], dequantize: Dequantize, free_bytes: int) -> tuple[int, tuple[int, int]]:
    """Makes copies of full precision where they are wanted. Returns their bytes and the rows that they begin at."""
    able = [each for each in products if each.copy_bytes]
    needed = sum(each.copy_bytes for each in able)
    if not able or dequantize == Dequantize.NEVER or (dequantize == Dequantize.AUTO and needed > free_bytes):
        return 0, (0, 0)
    begins = [each.copy() for each in able]
    return needed, (min(begins), max(begins))
