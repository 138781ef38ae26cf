"""A model without weights: transformers' own modules on torch's device `meta`, and the cost of a token there.

Owns how such a model is built, in the order in which `from_pretrained` builds one before it reads any weight, so that
which layers are quantized is transformers' decision and not a second opinion. It knows no device and no bytes.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import local_torch_dtype
from transformers.quantizers.auto import AutoHfQuantizer

from batchmill.worker.engine.continuous.support import Unsupported, probed_shape
from batchmill.worker.models.loaded.cached import cache_token_bytes

META = torch.device("meta")


@dataclass(frozen=True, slots=True)
class TokenCost:
    """The bytes that one token takes in the cache, and the engine that keeps it."""

    bytes: int
    #: The continuous engine serves the model; if not, the generate engine does, because of `reason`.
    continuous: bool
    reason: str = ""
    #: The sliding window, 0 for none; the continuous engine keeps what such layers no longer see.
    window_tokens: int = 0


def skeleton(
    config: PreTrainedConfig, dtype: torch.dtype, quantizing: BitsAndBytesConfig | None = None
) -> PreTrainedModel:
    """Builds the model of this configuration without weights, with the layers that bitsandbytes would quantize.

    `dtype`: of weights that are not quantized. Raises what transformers raises for a configuration that makes no model.
    """
    copy = deepcopy(config)
    # With a pad token some models look into their input for it, and there is nothing to see on this device.
    copy.get_text_config().pad_token_id = None
    copy.pad_token_id = None
    with META, local_torch_dtype(dtype):
        model = AutoModelForCausalLM.from_config(copy, dtype=dtype, trust_remote_code=False)
        if quantizing is not None:
            quantizer = AutoHfQuantizer.from_config(deepcopy(quantizing), pre_quantized=False)
            quantizer.preprocess_model(model=model, dtype=dtype, device_map={}, checkpoint_files=None)
    prepared: PreTrainedModel = model.eval()
    return prepared


def token_cost(model: PreTrainedModel, *, context_tokens: int | None) -> TokenCost:
    """Measures the cost of a token by a forward of an unquantized model without weights, as the engines do.

    `context_tokens`: of prompt and answer, None for no limit.
    """
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    window = (getattr(config, "sliding_window", None) or 0) if "sliding_attention" in kinds else 0
    try:
        shape = probed_shape(model, META, context_tokens=context_tokens)
    except Unsupported as error:
        return TokenCost(_generated_bytes(model), continuous=False, reason=str(error), window_tokens=window)
    return TokenCost(shape.token_bytes, continuous=True, window_tokens=window)


def _generated_bytes(model: PreTrainedModel) -> int:
    """Bytes of a token in transformers' own cache; by its heads, if a model cannot run without numbers."""
    try:
        return cache_token_bytes(model, META)
    except Exception:
        # A model may raise anything where no tensor has numbers.
        config = model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return int(2 * config.num_hidden_layers * heads * width * model.dtype.itemsize)
