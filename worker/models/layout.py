"""The device of each module of a model, computed before anything is loaded, from its shapes alone.

Owns the share of each device, the choice of modules to offload, and the refusals; accelerate moves the modules. It
reads the memory that is free, and no weights.
"""

from __future__ import annotations

import copy
import difflib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.accelerate import get_balanced_memory, infer_auto_device_map
from transformers.quantizers.auto import get_hf_quantizer

from batchmill.jobs.models.quantization import Kind, Quantization
from batchmill.jobs.runtime.logs import get_logger
from batchmill.jobs.runtime.sizes import size
from batchmill.worker.devices.memory import MemoryReader
from batchmill.worker.devices.placement import DISK, OFFLOADS, Placement
from batchmill.worker.devices.selection import CPU
from batchmill.worker.models.vetting import Refusal

log = get_logger(__name__)
#: The part of the free memory that weights may take: all of it leaves no room to load them, nor for cache and steps.
_WEIGHTS_PART = 0.9
#: The same for a GPU beside which weights are offloaded.
_BESIDE_OFFLOADED_PART = 0.75


@dataclass(frozen=True, slots=True)
class Layout:
    """The places of a loaded model's parts."""

    #: Module -> `cuda:N` as this process counts, `cpu` or `disk`; empty: all on one device.
    places: tuple[tuple[str, str], ...] = ()
    #: The number of the model's layers on each place, in the places' order.
    layers: tuple[tuple[str, int], ...] = ()

    @classmethod
    def of(cls, model: PreTrainedModel) -> Layout:
        """Reads the layout in which accelerate has placed the model."""
        places = {module: str(place) for module, place in getattr(model, "hf_device_map", {}).items()}
        return cls(tuple(places.items()), tuple(_layers(model, places)))

    @property
    def _all(self) -> set[str]:
        return {place for _, place in self.places}

    @property
    def spread(self) -> bool:
        """True where several devices compute."""
        return len(self._all - set(OFFLOADS)) > 1

    @property
    def offloaded(self) -> bool:
        """True where weights wait on a place that does not compute with them."""
        return DISK in self._all or (CPU in self._all and len(self._all) > 1)

    @property
    def on_disk(self) -> bool:
        """True where weights are read from disk while the model works."""
        return DISK in self._all

    def parts(self, devices: Sequence[str]) -> list[float]:
        """The part of the layers that each of these devices computes; the first one computes the offloaded ones."""
        layers = dict(self.layers)
        total = sum(layers.values())
        if not total:
            return [1.0] + [0.0] * (len(devices) - 1)
        rest = [layers.get(each, 0) / total for each in devices[1:]]
        return [1.0 - sum(rest), *rest]


#: A model that lies on one device.
WHOLE = Layout()
DeviceMap = dict[str, str | torch.device]


def lay_out(
    placement: Placement, quantization: Quantization, config: Any, arguments: Mapping[str, Any], device: torch.device
) -> DeviceMap:
    """Maps the modules of this config's model to devices, for from_pretrained; `asked`: its other arguments.

    `device` is the first of the placement's. Raises Refusal where modules do not fit, where the user's map is not of
    this model's modules, and where modules that have to be offloaded cannot be.
    """
    if placement.plain:
        return {"": device}
    model, quantizer = _empty(config, arguments)
    explicit = bool(placement.device_map)
    places = _explicit(placement, model) if explicit else _inferred(placement, model, quantizer, device)
    layout = Layout(tuple(places.items()), tuple(_layers(model, places)))
    if layout.offloaded:
        _refuse_offloading(quantization, quantizer, places)
    log.info("the model is laid out", layers=", ".join(f"{count} on {place}" for place, count in layout.layers))
    # To transformers the text `cpu` is a place of offloading: not so a CPU that computes.
    return {module: device if place == str(device) else place for module, place in places.items()}


def settle(model: PreTrainedModel) -> None:
    """Makes weights on disk readable: safetensors knows a CPU by its name alone, and accelerate hands on a device."""
    for module in model.modules():
        weights = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        while isinstance(weights, PrefixedDataset):
            weights = weights.dataset
        if isinstance(weights, OffloadedWeightsLoader) and weights.device is not None:
            weights.device = str(weights.device)


def _empty(config: Any, arguments: Mapping[str, Any]) -> tuple[PreTrainedModel, Any]:
    """Makes the model without weights, its layers as they will be quantized, and the quantizer, None for none."""
    config = copy.deepcopy(config)
    quantizer, config, _ = get_hf_quantizer(config, copy.deepcopy(arguments.get("quantization_config")), None, True, {})
    dtype = arguments.get("dtype", "auto")
    dtype = dtype if isinstance(dtype, torch.dtype) else config.dtype or torch.float32
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        if quantizer is not None:
            quantizer.preprocess_model(model=model, dtype=dtype, device_map={}, checkpoint_files=None)
    return model, quantizer


def _explicit(placement: Placement, model: PreTrainedModel) -> dict[str, str]:
    """Checks the user's own map, whose modules have to be this model's and all of them."""
    names = [name for name, _ in model.named_modules()]
    for module, _ in placement.device_map:
        if module not in names:
            near = difflib.get_close_matches(module, names, 1)
            raise Refusal(f"--device-map: it has no module {module!r}" + (f"; is it {near[0]!r}?" if near else ""))
    places = {module: placement.seen(place) for module, place in placement.device_map}
    for name in (*dict(model.named_parameters()), *dict(model.named_buffers())):
        if _place_of(name, places) is None:
            raise Refusal(f"--device-map: it says of no device for {name}; name that module, or one around it")
    return dict(_apart("", model, places))


def _apart(name: str, module: nn.Module, places: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Splits the map so that no module is inside another, whose place accelerate would take for both."""
    within = f"{name}." if name else ""
    if not any(each != name and each.startswith(within) for each in places):
        place = _place_of(name, places)
        if place is not None:
            yield name, place
        return
    own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    for tensor, _ in own:
        place = _place_of(within + tensor, places)
        if place is not None:
            yield within + tensor, place
    for child, each in module.named_children():
        yield from _apart(within + child, each, places)


def _inferred(placement: Placement, model: PreTrainedModel, quantizer: Any, device: torch.device) -> dict[str, str]:
    """Fills device after device as transformers does; it offloads only where not everything fits."""
    wanted = _filled(model, quantizer, _budget(placement, device, _WEIGHTS_PART))
    allowed = _allowed(placement, device)
    if placement.offload and set(wanted.values()) & set(OFFLOADS) - {str(device)}:
        wanted = _filled(model, quantizer, _budget(placement, device, _BESIDE_OFFLOADED_PART))
    outside = [module for module, place in wanted.items() if place not in allowed]
    computing = set(wanted.values()) - set(OFFLOADS) or device.type == CPU
    if outside or not computing:
        budget = _budget(placement, device, _BESIDE_OFFLOADED_PART if placement.offload else _WEIGHTS_PART)
        room = ", ".join(f"{size(count)} on {place}" for place, count in budget.items() if count)
        what = f"{len(outside)} of its modules" if outside else "all that computes"
        raise Refusal(
            f"it does not fit into {room or 'nothing'}: there is no place for {what}; give it more with --max-memory, "
            f"more devices, or {'--offload disk' if CPU in (placement.offload, device.type) else '--offload cpu'}"
        )
    return wanted


def _allowed(placement: Placement, device: torch.device) -> set[str]:
    places = {placement.seen(each) for each in placement.names} if device.type != CPU else {CPU}
    return places | {None: set(), CPU: {CPU}, DISK: set(OFFLOADS)}[placement.offload]


def _budget(placement: Placement, device: torch.device, part: float) -> dict[str, int]:
    """Bytes of weights by place, as asked or by the memory that is free; 0 for the CPU where it may not be used."""
    max_memory = {placement.seen(name): count for name, count in placement.max_memory}
    computing = [CPU] if device.type == CPU else [placement.seen(each) for each in placement.names]
    budget = {
        each: max_memory[each] if each in max_memory else int(part * MemoryReader(each).available_bytes())
        for each in computing
    }
    if CPU not in budget:
        free = int(_WEIGHTS_PART * MemoryReader(CPU).available_bytes()) if placement.offload else 0
        budget[CPU] = max_memory.get(CPU, free) if placement.offload else 0
    return budget


def _filled(model: PreTrainedModel, quantizer: Any, budget: Mapping[str, int]) -> dict[str, str]:
    """Makes transformers' own map within these bytes: GPUs evenly, then the CPU, then the disk."""
    max_memory: dict[int | str, int] = {CPU if each == CPU else int(each[5:]): count for each, count in budget.items()}
    alone = model._no_split_modules
    balanced = get_balanced_memory(model, max_memory, alone, quantizer)
    device_map = infer_auto_device_map(model, balanced, alone, hf_quantizer=quantizer)
    return {module: f"cuda:{place}" if isinstance(place, int) else place for module, place in device_map.items()}


def _refuse_offloading(quantization: Quantization, quantizer: Any, places: Mapping[str, str]) -> None:
    """Raises Refusal for a quantization that cannot be offloaded, as transformers says of it."""
    if quantizer is None:
        return
    try:
        quantizer.validate_environment(device_map=dict(places))
    except ValueError as error:
        kind = quantization.kind
        remedy = "choose -q int8:fp32_cpu_offload=true, which keeps what is offloaded as it was, or -q none"
        if kind is Kind.CHECKPOINT:
            remedy = "choose a checkpoint that is not quantized"
        raise Refusal(
            f"the model does not fit, and weights of -q {kind} cannot be offloaded; {remedy}, or give it more memory"
        ) from error


def _layers(model: PreTrainedModel, places: Mapping[str, str]) -> list[tuple[str, int]]:
    """Counts the layers, which transformers never splits by itself, on each place."""
    counted = Counter(dict.fromkeys(places.values(), 0))
    counted.update(filter(None, (_place_of(name, places) for name in _layer_names(model))))
    return list(counted.items())


def _layer_names(model: PreTrainedModel) -> Iterator[str]:
    whole = set(model._no_split_modules or ())
    return (name for name, each in model.named_modules() if type(each).__name__ in whole)


def _place_of(name: str, places: Mapping[str, str]) -> str | None:
    """The place of the module around this name, or else of the first within it; None for neither."""
    around = [module for module in places if not module or f"{name}.".startswith(f"{module}.")]
    if around:
        return places[max(around, key=len)]
    return next((place for module, place in places.items() if module.startswith(f"{name}.")), None)
