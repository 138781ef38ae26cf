"""Puts adapters beside a loaded model: peft names the layers that one changes, and its file holds their weights.

peft works on a copy of the model without weights, so that the model itself, quantized and laid out as it is, stays
as it was loaded. Every tensor of the file is accounted for; whatever goes wrong becomes one ModelError.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from time import monotonic
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from batchmill.jobs.errors import ModelError
from batchmill.jobs.models.adapters import Adapter
from batchmill.jobs.models.digests import Digests
from batchmill.jobs.models.identity import of_adapter, of_commit
from batchmill.jobs.runtime.logs import get_logger
from batchmill.worker.models.adapters.low_rank import LoadedAdapter, LowRank
from batchmill.worker.models.adapters.options import lora_options
from batchmill.worker.models.load import LoadedModel, refuse_changed
from batchmill.worker.models.reasons import reason
from batchmill.worker.models.source import find_adapter
from batchmill.worker.models.vetting import ADAPTER_WEIGHTS, Refusal, vet_adapter

log = get_logger(__name__)
#: The prefix that peft writes in front of a module's name.
_PREFIX = "base_model.model."
_ADAPTER = "default"


def with_adapters(loaded: LoadedModel, adapters: Sequence[Adapter], *, digests: Digests | None = None) -> LoadedModel:
    """Puts these adapters beside a model. Raises ModelError, which names the adapter and says what to do.

    `digests`: the digests that are known of their files.
    """
    loaded_adapters = []
    for adapter in adapters:
        started = monotonic()
        try:
            loaded_adapters.append(_load(adapter, loaded.model, digests or Digests()))
        except ModelError:
            raise
        except Refusal as error:
            raise ModelError(f"cannot load the adapter {adapter}: {error}") from None
        except Exception as error:
            # The gateway of peft, safetensors and the Hub, whose errors have nothing in common.
            raise ModelError(f"cannot load the adapter {adapter}: {reason(error)}") from error
        seconds = round(monotonic() - started, 3)
        log.info("adapter loaded", name=adapter.name, layers=len(loaded_adapters[-1].layers), load_seconds=seconds)
    weights_bytes = loaded.weights_bytes + sum(each.nbytes for each in loaded_adapters)
    return replace(loaded, adapters=tuple(loaded_adapters), weights_bytes=weights_bytes)


def _load(adapter: Adapter, model: PreTrainedModel, digests: Digests) -> LoadedAdapter:
    folder, commit = find_adapter(adapter.path, adapter.revision)
    config = vet_adapter(folder)
    content = of_adapter(folder, digests) if commit is None else of_commit(commit)
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    base = str(config.get("base_model_name_or_path"))[:100]
    try:
        layers = _layers(_injected(model, lora_options(config)), tensors, model)
    except _OtherBase as error:
        raise Refusal(f"{error}: it was made for another base ({base!r}), or its weights are not its own") from None
    refuse_changed(content)
    return LoadedAdapter(replace(adapter, identity=content.identity), content, layers)


class _OtherBase(Exception):
    """A sign that adapter and model do not belong together."""


def _injected(model: PreTrainedModel, options: Mapping[str, Any]) -> dict[str, Any]:
    """peft's layers by the name of the module that each changes, without weights. Raises _OtherBase."""
    # Imported here: it takes seconds, and most workers hold no adapter.
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(copy.deepcopy(model.config), trust_remote_code=False)
        try:
            inject_adapter_in_model(LoraConfig(**options), skeleton, _ADAPTER, low_cpu_mem_usage=True)
        except ValueError as error:
            raise _OtherBase(f"peft finds none of what it changes in this model ({str(error)[:200]})") from None
    return {name: each for name, each in skeleton.named_modules() if isinstance(each, BaseTunerLayer)}


def _layers(injected: Mapping[str, Any], tensors: dict[str, Tensor], model: PreTrainedModel) -> dict[str, LowRank]:
    """Makes the low-rank weights of each of these layers, on the layer's device. Raises Refusal and _OtherBase."""
    left = dict(tensors)
    layers = {name: _low_rank(name, layer, left, model.get_submodule(name)) for name, layer in injected.items()}
    for key, tensor in left.items():
        if not _is_the_models_own(key, tensor, model):
            raise _OtherBase(f"its weights hold {key[:200]}, which is no part of what it changes in this model")
    return layers


def _low_rank(name: str, layer: Any, left: dict[str, Tensor], real: nn.Module) -> LowRank:
    """Takes one layer's tensors out of those that are left."""
    from peft.tuners.lora import Embedding, Linear

    if type(layer) not in (Embedding, Linear) or layer.lora_variant:
        raise Refusal(f"it changes {name}, which is no linear layer and no embedding ({type(real).__name__})")
    embeds = type(layer) is Embedding
    if embeds and type(real) is not nn.Embedding:
        raise Refusal(f"it changes {name}, which is an embedding of its own kind ({type(real).__name__})")
    suffixes = ("lora_embedding_A", "lora_embedding_B") if embeds else ("lora_A.weight", "lora_B.weight")
    down, up = (_taken(left, f"{_PREFIX}{name}.{suffix}") for suffix in suffixes)
    bias = _taken(left, f"{_PREFIX}{name}.lora_B.bias") if layer.lora_bias[_ADAPTER] else None
    rank = layer.r[_ADAPTER]
    wanted = (rank, layer.in_features), (layer.out_features, rank)
    if (tuple(down.shape), tuple(up.shape)) != wanted or (bias is not None and bias.shape != up.shape[:1]):
        raise _OtherBase(
            f"{name} takes {layer.in_features} numbers and gives {layer.out_features}, and at rank {rank} its weights "
            f"are {tuple(down.shape)} and {tuple(up.shape)}, not {wanted[0]} and {wanted[1]}"
        )
    device = _device(real)
    down, up = down.to(device, torch.float32), up.to(device, torch.float32)
    return LowRank(
        down, up, None if bias is None else bias.to(device, torch.float32), float(layer.scaling[_ADAPTER]), embeds
    )


def _taken(left: dict[str, Tensor], key: str) -> Tensor:
    if key not in left:
        raise _OtherBase(f"its weights lack {key}")
    return left.pop(key)


def _device(layer: nn.Module) -> torch.device:
    """The device that a layer computes on: accelerate's hook knows it for a layer whose weights are kept elsewhere."""
    hook: Any = getattr(layer, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    return next(layer.parameters()).device if device is None else torch.device(device)


def _is_the_models_own(key: str, tensor: Tensor, model: PreTrainedModel) -> bool:
    """True for an unchanged embedding of the base: peft saves those beside an adapter that targets one."""
    name = key.removeprefix(_PREFIX).removesuffix(".weight").removesuffix(".base_layer")
    own: Any = dict(model.named_modules()).get(name)
    if own is None or own not in (model.get_input_embeddings(), model.get_output_embeddings()):
        return False
    weight: Tensor = own.weight.data
    return weight.shape == tensor.shape and torch.equal(tensor.to(weight.device, weight.dtype), weight)
