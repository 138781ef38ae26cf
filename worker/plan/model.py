"""The model that is planned: its configuration and, in each quantization on each kind of device, its bytes.

Owns what is computed once: a model without weights is made for each layout of its weights and dtype, however many
devices and options ask for it. It knows no memory and no speed.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from batchmill.jobs.models.quantization import Quantization
from batchmill.jobs.models.spec import ModelSpec
from batchmill.worker.models.configuration import read_configuration
from batchmill.worker.models.hub.client import TensorHeader
from batchmill.worker.models.quantization.checkpoint import Checkpoint
from batchmill.worker.models.quantization.quantization_config import pretrained_arguments
from batchmill.worker.models.source import headers
from batchmill.worker.plan.footprint import Footprint, footprint
from batchmill.worker.plan.shape import TokenCost, skeleton, token_cost

#: The dtypes of plain weights, as a safetensors header spells them.
_STORED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class QuantizedModel:
    """A model in one quantization on one kind of device."""

    quantization: Quantization
    #: Dtype of weights that are not quantized.
    dtype: torch.dtype
    footprint: Footprint
    token: TokenCost


class PlannedModel:
    """A model that is planned from its configuration, which `folder` holds at least.

    Raises what transformers raises for a configuration that it cannot read.
    """

    def __init__(self, spec: ModelSpec, folder: Path) -> None:
        self.spec = spec
        self.folder = folder
        self.config = read_configuration(folder)
        self._tokens: dict[torch.dtype, TokenCost] = {}
        self._footprints: dict[tuple[object, ...], Footprint] = {}

    @property
    def context_tokens(self) -> int | None:
        """The model's own context, of prompt and answer together; None for no limit."""
        limit: int | None = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        return limit

    @property
    def vocabulary(self) -> int:
        """Tokens that have an embedding."""
        size: int = self.config.get_text_config().vocab_size
        return size

    @cached_property
    def parameters(self) -> int:
        """The number of trained parameters, tied ones counted once."""
        return sum(each.numel() for each in self._plain(torch.float32).parameters())

    def holding(
        self, quantization: Quantization, device: torch.device, *, context_tokens: int | None = None
    ) -> QuantizedModel:
        """Computes the model's bytes in this quantization, as a worker on this device would load it.

        `context_tokens`: the context that was asked for. Raises Refusal where that worker would refuse.
        """
        config = deepcopy(self.config)
        spec = ModelSpec(self.spec.model, self.spec.revision, quantization)
        arguments = pretrained_arguments(spec, config, self.folder, device)
        dtype = self._dtype(arguments)
        context = min(filter(None, (context_tokens, self.context_tokens)), default=None)
        return QuantizedModel(
            quantization, dtype, self._footprint(arguments, dtype, config), self._token(dtype, context)
        )

    def _dtype(self, arguments: Mapping[str, Any]) -> torch.dtype:
        """The dtype of unquantized weights; `auto` is the configuration's, or else that of the first weights."""
        dtype = arguments["dtype"]
        if dtype == "auto":
            dtype = self.config.dtype or next(
                (_STORED[each.dtype] for each in self._stored.values() if each.dtype in _STORED), torch.float32
            )
        torch_dtype: torch.dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        return torch_dtype

    @cached_property
    def _stored(self) -> Mapping[str, TensorHeader]:
        return headers(self.spec)

    def _footprint(self, arguments: Mapping[str, Any], dtype: torch.dtype, config: PreTrainedConfig) -> Footprint:
        quantizing = arguments.get("quantization_config")
        # The type of 4-bit values makes no difference to their bytes.
        options = {} if quantizing is None else quantizing.to_dict() | {"bnb_4bit_quant_type": None}
        key = (dtype, str(options))
        if key not in self._footprints:
            checkpoint = Checkpoint.of(config)
            # The configuration says what becomes of such weights: they stay, or are plain once loaded.
            stays = checkpoint is not None and "dequantize" not in checkpoint.written
            model = self._plain(dtype) if quantizing is None else skeleton(self.config, dtype, quantizing)
            self._footprints[key] = footprint(model, dtype, self._stored if stays else None)
        return self._footprints[key]

    def _token(self, dtype: torch.dtype, context_tokens: int | None) -> TokenCost:
        if dtype not in self._tokens:
            self._tokens[dtype] = token_cost(self._plain(dtype), context_tokens=context_tokens)
        return self._tokens[dtype]

    def _plain(self, dtype: torch.dtype) -> PreTrainedModel:
        return skeleton(self.config, dtype)
