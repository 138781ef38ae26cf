"""Fuses linear layers that read the same tensor into one matmul.

Owns the arithmetic: weights laid one below the other, quantized as they are, block scales of their own; and, for
4-bit weights, a copy of full precision that large inputs are multiplied with. The values are those of the layers;
a copy's differ from the fused kernel's by the rounding of the weights, as in bitsandbytes' own fallback. This module
knows no model and no order of calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any, Protocol

import bitsandbytes
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import Tensor, nn
from torch.nn import functional

#: Inputs of fewer rows are as fast from packed 4-bit weights on a CPU, whose fused kernel reads a quarter of the
#: bytes; measured on AVX-512 with bf16, on 45 and 250 million parameters.
CPU_COPY_ROWS = 32
#: Columns of a weight that are read back from a fused kernel at once.
_IDENTITY_ROWS = 256
#: bitsandbytes never runs its fused CUDA kernel beyond so many rows.
_CUDA_FUSED_ROWS = 1536


class FusedMatmul(Protocol):
    """One matmul of several layers: float [..., inputs] -> [..., sum of widths], in x's dtype, outputs side by side."""

    widths: tuple[int, ...]

    def __call__(self, x: Tensor) -> Tensor: ...

    def adopt(self) -> None:
        """Makes the layers' weights views of this product's, so that nothing is held twice."""

    @property
    def copy_bytes(self) -> int:
        """Bytes of a copy of full precision; 0 for a product that can have none."""

    def copy(self) -> int:
        """Makes that copy. Returns the least number of rows of x for which it is used."""


def fused_matmul_of(layers: Sequence[nn.Linear]) -> FusedMatmul | None:
    """Fuses layers of one kind and one input width; None where they cannot be computed as one."""
    first = layers[0]
    alike = {(type(each), each.in_features, each.bias is None, each.training) for each in layers}
    if len(alike) > 1 or first.training or any("forward" in vars(each) for each in layers):
        return None
    if type(first) is Linear4bit:
        return _four_bit(layers)
    if len(layers) == 1:
        return None  # what bitsandbytes and torch do for one layer is as good
    if type(first) is Linear8bitLt:
        states: list[Any] = [each.state for each in layers]
        ready = all(each.CB is not None and not each.has_fp16_weights for each in states)
        return _Int8(layers) if ready and len({each.threshold for each in states}) == 1 else None
    if type(first) is nn.Linear and len({each.weight.dtype for each in layers}) == 1:
        return _Plain(layers)
    return None


def _four_bit(layers: Sequence[nn.Linear]) -> FusedMatmul | None:
    """Fuses 4-bit layers of one kind, whose blocks end where a row of the weight does; None for others."""
    states: list[Any] = [getattr(each.weight, "quant_state", None) for each in layers]
    if any(each is None or len(each.shape) != 2 or each.shape[1] % each.blocksize for each in states):
        return None
    kinds = {
        (state.quant_type, state.blocksize, state.dtype, layer.compute_dtype, layer.weight.dtype, _packed(state))
        for state, layer in zip(states, layers, strict=True)
    }
    _, _, dtype, compute, stored, packed = next(iter(kinds))
    if len(kinds) > 1 or stored != torch.uint8:
        return None
    if packed:
        return _Packed4Bit(layers) if compute in (torch.float32, torch.bfloat16) else None
    return _Blocks4Bit(layers) if compute == dtype else None


def _packed(state: Any) -> bool:
    """True where bitsandbytes has repacked this weight for its fused kernel on a CPU."""
    return bool(getattr(state, "packing_format_for_cpu", False))


class _Joined:
    """The base of all products: the layers, their widths and their biases, None where they have none."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        self._layers = layers
        self.widths = tuple(each.out_features for each in layers)
        biases = [each.bias.data for each in layers if each.bias is not None]
        self._bias = torch.cat(biases) if biases else None

    def _views(self, weight: Tensor) -> Sequence[Tensor]:
        """Each layer's part of a weight that has the outputs in its first dimension, or blocks of them."""
        total = sum(self.widths)
        return torch.split(weight, [weight.shape[0] * width // total for width in self.widths])

    @property
    def copy_bytes(self) -> int:
        return 0

    def copy(self) -> int:
        raise TypeError(f"{type(self).__name__} has no copy")


class _Plain(_Joined):
    """Weights that are not quantized."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__(layers)
        self._weight = torch.cat([each.weight.data for each in layers])

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(x, self._weight, self._bias)

    def adopt(self) -> None:
        for layer, view in zip(self._layers, self._views(self._weight), strict=True):
            layer.weight.data = view


class _Int8(_Joined):
    """LLM.int8() weights: the input is quantized once for all layers, outliers as each would find them."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__(layers)
        states: list[Any] = [each.state for each in layers]
        self._state = state = bitsandbytes.MatmulLtState()
        state.CB = torch.cat([each.CB for each in states])
        state.SCB = torch.cat([each.SCB for each in states])
        state.threshold, state.use_pool = states[0].threshold, states[0].use_pool
        state.has_fp16_weights = state.is_training = False

    def __call__(self, x: Tensor) -> Tensor:
        if self._bias is not None and self._bias.dtype != x.dtype:
            self._bias = self._bias.to(x.dtype)
        output: Tensor = bitsandbytes.matmul(x, self._state.CB, bias=self._bias, state=self._state)
        return output

    def adopt(self) -> None:
        for layer, view in zip(self._layers, self._views(self._state.CB), strict=True):
            state: Any = layer.state
            state.CB = layer.weight.data = view


class _FourBit(_Joined):
    """The base of both layouts of 4-bit weights: a copy for large inputs."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__(layers)
        self._state = layers[0].weight.quant_state  # type: ignore[attr-defined]
        self._compute: torch.dtype = layers[0].compute_dtype  # type: ignore[assignment]
        self._shape = (sum(self.widths), layers[0].in_features)
        self._weight = _together([each.weight.data for each in layers])
        self._bias = None if self._bias is None else self._bias.to(self._compute)
        self._copy: Tensor | None = None
        self._copy_rows = 0

    @property
    def copy_bytes(self) -> int:
        dtype: torch.dtype = self._state.dtype
        return self._shape[0] * self._shape[1] * dtype.itemsize

    def adopt(self) -> None:
        for layer, view in zip(self._layers, self._views(self._weight), strict=True):
            layer.weight.data = view


class _Packed4Bit(_FourBit):
    """4-bit weights as bitsandbytes packs them for its fused kernel on a CPU, which computes in bfloat16.

    The kernel is called without what a layer does around it at each call. The copy lies in oneDNN's own layout.
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__(layers)
        self._absmax = _together([each.weight.quant_state.absmax for each in layers], dim=1)  # type: ignore[attr-defined]

    def __call__(self, x: Tensor) -> Tensor:
        if not x.numel():
            return x.new_empty(*x.shape[:-1], self._shape[0])  # the kernel divides by the number of rows
        rows = x.reshape(-1, self._shape[1]).to(torch.bfloat16)
        if self._copy is not None and rows.shape[0] >= self._copy_rows:
            output: Tensor = torch.ops.mkldnn._linear_pointwise.default(rows, self._copy, None, "none", [], "")
        else:
            output = self._fused(rows)
        if self._bias is not None:
            output = output.to(self._compute) + self._bias
        return output.to(x.dtype).view(*x.shape[:-1], self._shape[0])

    def _fused(self, rows: Tensor) -> Tensor:
        output: Tensor = torch.ops.bitsandbytes.gemv_4bit.default(
            rows, self._weight, self._shape, self._absmax, self._state.code, self._state.blocksize
        )
        return output

    def copy(self) -> int:
        """Reads the weights back from the fused kernel, as its products with the rows of an identity matrix."""
        inputs = self._shape[1]
        weight = torch.empty(self._shape, dtype=torch.bfloat16)
        for begin in range(0, inputs, _IDENTITY_ROWS):
            rows = torch.zeros(min(_IDENTITY_ROWS, inputs - begin), inputs, dtype=torch.bfloat16)
            rows.fill_diagonal_(1) if begin == 0 else rows.diagonal(begin).fill_(1)
            weight[:, begin : begin + len(rows)] = self._fused(rows).t()
        self._copy = torch.ops.mkldnn._reorder_linear_weight.default(weight)
        self._copy_rows = CPU_COPY_ROWS
        return self._copy_rows


class _Blocks4Bit(_FourBit):
    """4-bit weights in the order in which they were quantized: on CUDA, and on a CPU without bf16 arithmetic."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__(layers)
        self._state = QuantState(
            absmax=torch.cat([_scales(each.weight.quant_state) for each in layers]),  # type: ignore[attr-defined]
            shape=torch.Size(self._shape),
            code=self._state.code,
            blocksize=self._state.blocksize,
            quant_type=self._state.quant_type,
            dtype=self._state.dtype,
        )

    def __call__(self, x: Tensor) -> Tensor:
        taken = x.to(self._compute)
        if self._copy is not None and x.numel() >= self._copy_rows * self._shape[1]:
            return functional.linear(taken, self._copy, self._bias).to(x.dtype)
        output: Tensor = bitsandbytes.matmul_4bit(taken, self._weight, bias=self._bias, quant_state=self._state)
        return output.to(x.dtype)

    def copy(self) -> int:
        """Dequantizes the weights, for inputs where bitsandbytes would do it at each call: the values are the same."""
        self._copy = dequantize_4bit(self._weight, self._state)
        self._copy_rows = 1 + _fused_rows(self._weight.device, self._compute, *self._shape)
        return self._copy_rows


def _together(parts: list[Tensor], dim: int = 0) -> Tensor:
    """One tensor of several; a single one stays where it is."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _scales(state: QuantState) -> Tensor:
    """A weight's block scales, float32 [blocks], out of their own quantization where they have one."""
    scales: Tensor = state.absmax
    if state.nested:
        scales = dequantize_blockwise(scales, state.state2) + state.offset
    return scales.reshape(-1)


def _fused_rows(device: torch.device, dtype: torch.dtype, outputs: int, inputs: int) -> int:
    """The most rows that bitsandbytes' fused kernel takes of this shape; beyond, it dequantizes at each call."""
    if device.type != "cuda":
        return 0
    # The check of bitsandbytes itself; for a version without it the copy begins where no kernel is fused.
    fused = getattr(import_module("bitsandbytes.backends.cuda.ops"), "_gemm_4bit_use_custom_fn", None)
    for rows in range(1, _CUDA_FUSED_ROWS + 1):
        if fused is not None and not fused(device.index, dtype, rows, outputs, inputs):
            return rows - 1
    return _CUDA_FUSED_ROWS
