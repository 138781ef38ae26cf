"""The support of a model by the continuous engine, and the shape of its KV cache, probed by a forward of two tokens.

Owns the arguments that a layer may pass to attention. A model is judged by what it does, never by its name.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import PreTrainedModel

from batchmill.worker.engine.continuous.attention.cache import CacheShape
from batchmill.worker.engine.continuous.attention.interface import attention_function
from batchmill.worker.engine.stretching import stretched
from batchmill.worker.models.load import LoadedModel

#: Arguments of attention that are honoured, and those without an effect here.
_UNDERSTOOD = {"scaling", "sliding_window", "softcap"}
_WITHOUT_EFFECT = {"dropout", "position_ids", "use_cache", "output_router_logits", "is_causal", "cache_position"}
#: Kinds of layers whose attention sees all tokens before it, or a window of them.
_LAYER_TYPES = {"full_attention", "sliding_attention"}


class Unsupported(Exception):
    """A model that this engine cannot serve; the text says why."""


def cache_shape(loaded: LoadedModel) -> CacheShape:
    """Probes the shape of the model's KV cache by a forward of two tokens. Raises Unsupported."""
    if loaded.layout.spread:
        raise Unsupported("its layers are spread over several devices")
    return probed_shape(loaded.model, loaded.device, context_tokens=loaded.context_tokens)


def probed_shape(model: PreTrainedModel, device: torch.device, *, context_tokens: int | None) -> CacheShape:
    """Probes the shape for a model that may have no weights, on the device `meta`. Raises Unsupported."""
    config = model.config
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        raise Unsupported("it computes the logits of every token of a prompt")
    if config.is_encoder_decoder:
        raise Unsupported("it has an encoder")
    _refuse_longest(config.get_text_config(), context_tokens)
    seen = _ProbeAttention()
    positions = torch.arange(2, device=device)[None]
    try:
        with torch.inference_mode(), attention_function(model, seen):
            model(input_ids=torch.zeros_like(positions), position_ids=positions, use_cache=False)
    except Exception as error:
        # A model may raise anything over an attention function that it does not expect.
        raise Unsupported(f"its attention takes no other function ({type(error).__name__})") from error
    return seen.shape(config.get_text_config())


class _ProbeAttention:
    """An attention function that notes its arguments."""

    def __init__(self) -> None:
        self._layers: dict[int, tuple[tuple[int, int, int], torch.dtype]] = {}
        self._query_heads = 0
        self._options: set[str] = set()
        self._windows: dict[int, int | None] = {}

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        layer: Any = module.layer_idx
        self._query_heads = max(self._query_heads, query.shape[1])
        self._layers[layer] = (key.shape[1], key.shape[3], value.shape[3]), key.dtype
        self._windows[layer] = options.get("sliding_window")
        self._options |= {name for name, option in options.items() if option is not None}
        if attention_mask is not None:
            self._options.add("attention_mask")
        return query.new_zeros((1, query.shape[2], query.shape[1], value.shape[3])), None

    def shape(self, config: Any) -> CacheShape:
        layers = config.num_hidden_layers
        if sorted(self._layers) != list(range(layers)):
            raise Unsupported(f"{len(self._layers)} of its {layers} layers attend through transformers' interface")
        if unknown := sorted(self._options - _UNDERSTOOD - _WITHOUT_EFFECT):
            raise Unsupported(f"its attention asks for {', '.join(unknown)}")
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * layers
        if unknown := sorted(set(kinds) - _LAYER_TYPES):
            raise Unsupported(f"it has layers of {', '.join(unknown)}")
        if any(kind == "sliding_attention" and self._windows[place] is None for place, kind in enumerate(kinds)):
            raise Unsupported("its layers do not say how far they see")
        if len(set(self._layers.values())) > 1:
            raise Unsupported("its layers keep keys of different sizes")
        (heads, key_size, value_size), dtype = self._layers[0]
        return CacheShape(
            layers,
            heads,
            key_size,
            value_size,
            dtype,
            capped="softcap" in self._options,
            query_heads=self._query_heads,
            windows=tuple(sorted({each for each in self._windows.values() if each is not None})),
        )


def refuse_outliers(model: PreTrainedModel) -> None:
    """Raises Unsupported for a model whose layers round a row by what its neighbours hold."""
    if finds_outliers(model):
        raise Unsupported("LLM.int8() looks for outlier columns in all rows of a batch together")


def finds_outliers(model: PreTrainedModel) -> bool:
    """True where LLM.int8() looks for outlier columns, which it computes apart."""
    states = (getattr(module, "state", None) for module in model.modules())
    return any(getattr(state, "threshold", 0.0) for state in states)


def _refuse_longest(config: Any, context_tokens: int | None) -> None:
    """Raises Unsupported for rotary embeddings that this context stretches by the longest row of a batch."""
    for _, original in stretched(config):
        if original is None or context_tokens is None or context_tokens > original:
            limit = f"; with --context {original} it can be served" if original else ""
            raise Unsupported(f"its positions depend on the longest row of a batch{limit}")
