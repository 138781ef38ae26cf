"""The bytes that a model's weights take once it is loaded, counted over a model without weights.

Owns bitsandbytes' layouts in memory, which are its files' too, and what of a model a token step reads. It knows no
device. `weights_bytes` is what `get_memory_footprint()` says of the loaded model, plus the scales of quantized weights,
which are on the device as well and which that function leaves out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from transformers import PreTrainedModel
from transformers.core_model_loading import build_glob_alternation

from batchmill.worker.models.hub.client import TensorHeader

#: bitsandbytes' 4-bit format: weights in blocks of 64, whose scales are themselves quantized in blocks of 256.
_BLOCK, _NESTED_BLOCK = 64, 256
_FLOAT_BYTES = 4
#: The values that a code of 4 bits and one of 8 bits stand for, and the mean of nested scales: float32, one of each.
_CODE_BYTES, _NESTED_CODE_BYTES, _OFFSET_BYTES = 16 * _FLOAT_BYTES, 256 * _FLOAT_BYTES, _FLOAT_BYTES
#: The dtypes, as a safetensors header spells them, that transformers turns into the one that is asked for.
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
#: Parts of the names under which bitsandbytes stores what get_memory_footprint() leaves out.
_BITSANDBYTES_SCALES = (".weight.", ".SCB")

#: A few bytes of JSON beside each 4-bit weight in a file.
_DESCRIPTION = ".quant_state."


class Role(Enum):
    """The role of a parameter in a token step, which reads next to nothing of the embedding and some of the experts."""

    PACKED = "quantized"
    HEAD = "output embedding"
    EMBEDDING = "input embedding"
    EXPERT = "experts"
    OTHER = "the rest"


@dataclass(frozen=True, slots=True)
class Footprint:
    """The bytes of a loaded model before its first forward, and their part in a token step."""

    #: Parameters and buffers.
    footprint_bytes: int
    #: The scales and codes beside quantized weights.
    scales_bytes: int
    #: A copy of the 4-bit weights in the dtype around them, as the engine makes it.
    copy_bytes: int
    #: Weights by their role in a step, with their scales.
    packed_bytes: int
    head_bytes: int
    expert_bytes: int
    other_bytes: int
    #: Numbers that a token is multiplied with; the head's are among the plain ones.
    packed_parameters: int
    plain_parameters: int
    expert_parameters: int

    @property
    def weights_bytes(self) -> int:
        return self.footprint_bytes + self.scales_bytes


@dataclass(frozen=True, slots=True)
class _ParameterBytes:
    """The bytes of one parameter."""

    #: Elements, unpacked.
    numbers: int
    bytes: int
    scales_bytes: int
    #: A copy in the dtype around it; 0 where none is made.
    copy_bytes: int
    role: Role


def footprint(
    model: PreTrainedModel, dtype: torch.dtype, stored: Mapping[str, TensorHeader] | None = None
) -> Footprint:
    """Counts the bytes of this model without weights. `dtype`: of weights that are not quantized.

    `stored`: the tensors of a checkpoint that is quantized already; they stay as they are, except plain floats.
    """
    parts = list(_parts(model, dtype) if stored is None else _stored_parts(model, dtype, stored))
    return _sum(parts, sum(each.nbytes for each in model.buffers()))


def _parts(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[_ParameterBytes]:
    plain_bytes = _plain_bytes(model, dtype)
    for name, parameter, owner in _parameters(model):
        if name.endswith("weight") and isinstance(owner, Linear4bit):
            yield _four_bit(parameter, owner, dtype)
        elif name.endswith("weight") and isinstance(owner, Linear8bitLt):
            yield _ParameterBytes(
                parameter.numel(), parameter.numel(), owner.out_features * _FLOAT_BYTES, 0, Role.PACKED
            )
        else:
            yield _ParameterBytes(parameter.numel(), plain_bytes(name, parameter), 0, 0, _role(model, parameter, owner))


def _stored_parts(
    model: PreTrainedModel, dtype: torch.dtype, stored: Mapping[str, TensorHeader]
) -> Iterator[_ParameterBytes]:
    """Counts plain floats that the model knows by name; everything else lies in memory as in the file."""
    plain_bytes = _plain_bytes(model, dtype)
    plain = {name for name, header in stored.items() if header.dtype in _FLOATS}
    aliases: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), set()).add(name)
    for name, parameter, owner in _parameters(model):
        if aliases[id(parameter)] & plain:
            yield _ParameterBytes(parameter.numel(), plain_bytes(name, parameter), 0, 0, _role(model, parameter, owner))
        else:
            copied = parameter.numel() * dtype.itemsize if f"{name}.absmax" in stored else 0
            yield _ParameterBytes(parameter.numel(), 0, 0, copied, Role.PACKED)
    known = plain & set().union(*aliases.values())
    for name, header in stored.items():
        if name not in known and _DESCRIPTION not in name:
            scales = any(part in name for part in _BITSANDBYTES_SCALES)
            yield _ParameterBytes(0, 0 if scales else header.bytes, header.bytes if scales else 0, 0, Role.PACKED)


def _parameters(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor, torch.nn.Module]]:
    """Each parameter once, with its name and its module."""
    seen: set[int] = set()
    for place, owner in model.named_modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield f"{place}.{name}".lstrip("."), parameter, owner


def _role(model: PreTrainedModel, parameter: torch.Tensor, owner: torch.nn.Module) -> Role:
    head = model.get_output_embeddings()
    if head is not None and parameter is head.weight:
        return Role.HEAD
    if parameter is model.get_input_embeddings().weight:
        return Role.EMBEDDING
    # The weights of all experts of a layer are one tensor, the expert in its first dimension.
    is_expert = parameter.dim() == 3 and not isinstance(owner, torch.nn.Conv1d)
    return Role.EXPERT if is_expert else Role.OTHER


def _plain_bytes(model: PreTrainedModel, dtype: torch.dtype) -> Callable[[str, torch.Tensor], int]:
    """Returns the byte count of parameters that are not quantized: some families keep a few in float32."""
    kept = model._get_dtype_plan(dtype)
    pattern = build_glob_alternation(list(kept))[0] if kept else None

    def of(name: str, parameter: torch.Tensor) -> int:
        wide = pattern is not None and pattern.search(name)
        return parameter.numel() * (_FLOAT_BYTES if wide else parameter.dtype.itemsize)

    return of


def _four_bit(parameter: torch.Tensor, owner: Linear4bit, dtype: torch.dtype) -> _ParameterBytes:
    numbers = parameter.numel()
    blocks = -(-numbers // _BLOCK)
    scales = blocks * _FLOAT_BYTES + _CODE_BYTES
    if parameter.compress_statistics:  # type: ignore[attr-defined]
        nested = -(-blocks // _NESTED_BLOCK) * _FLOAT_BYTES
        scales = blocks + nested + _CODE_BYTES + _NESTED_CODE_BYTES + _OFFSET_BYTES
    copied = numbers * dtype.itemsize if owner.in_features % _BLOCK == 0 else 0
    return _ParameterBytes(numbers, (numbers + 1) // 2, scales, copied, Role.PACKED)


def _sum(parts: list[_ParameterBytes], buffers_bytes: int) -> Footprint:
    def of(role: Role) -> int:
        return sum(each.bytes + each.scales_bytes for each in parts if each.role is role)

    return Footprint(
        footprint_bytes=buffers_bytes + sum(each.bytes for each in parts),
        scales_bytes=sum(each.scales_bytes for each in parts),
        copy_bytes=sum(each.copy_bytes for each in parts),
        packed_bytes=of(Role.PACKED),
        head_bytes=of(Role.HEAD),
        expert_bytes=of(Role.EXPERT),
        other_bytes=of(Role.OTHER),
        packed_parameters=sum(each.numbers for each in parts if each.role is Role.PACKED),
        plain_parameters=sum(each.numbers for each in parts if each.role in (Role.HEAD, Role.OTHER)),
        expert_parameters=sum(each.numbers for each in parts if each.role is Role.EXPERT),
    )
