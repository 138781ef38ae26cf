"""The quantization of a checkpoint, as its config.json says, and the check that it can run here.

Owns every method that transformers lists: the library that it needs and the command that installs it, the methods that
a CPU cannot run, and those that are dequantized while they are loaded. It reads names and shapes, and no tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import safe_open

from batchmill.jobs.runtime.logs import get_logger
from batchmill.worker.models.vetting import Refusal, weights

log = get_logger(__name__)

BITSANDBYTES_4BIT, BITSANDBYTES_8BIT = "bitsandbytes_4bit", "bitsandbytes_8bit"
COMPRESSED_TENSORS = "compressed-tensors"
_HUB_KERNELS = "its kernels are code fetched from the Hub, which is never run"
_NO_KERNELS = "nothing here multiplies by its weights as they are stored"
_NO_EXTRA = (
    "batchmill has no extra for them today, since no release of theirs installs beside its torch and transformers; "
    "take the original with -q nf4"
)
_SCALES = ".weight_scale_inv"
#: From this CUDA capability on, torch multiplies in FP8.
_FP8_CAPABILITY = (8, 9)


@dataclass(frozen=True, slots=True)
class _CheckpointFormat:
    """The needs of one quantization method."""

    #: Modules that have to be importable.
    modules: tuple[str, ...] = ()
    #: The package that brings them; empty where none does beside the versions that batchmill needs.
    package: str = ""
    #: True where it runs on a CPU.
    cpu: bool = True
    #: The reason why it is dequantized; empty where it is not.
    dequantized: str = ""


_METHODS: Mapping[str, _CheckpointFormat] = {
    BITSANDBYTES_4BIT: _CheckpointFormat(),
    BITSANDBYTES_8BIT: _CheckpointFormat(),
    "gptq": _CheckpointFormat(("gptqmodel", "optimum")),
    "awq": _CheckpointFormat(("gptqmodel",)),
    COMPRESSED_TENSORS: _CheckpointFormat(
        ("compressed_tensors",), "batchmill[compressed-tensors]", dequantized=_NO_KERNELS
    ),
    "fp8": _CheckpointFormat(dequantized=_HUB_KERNELS),
    "mxfp8": _CheckpointFormat(dequantized=_HUB_KERNELS),
    "mxfp4": _CheckpointFormat(dequantized=_HUB_KERNELS),
    "fbgemm_fp8": _CheckpointFormat(("fbgemm_gpu",), "fbgemm-gpu-genai", cpu=False),
    "aqlm": _CheckpointFormat(("aqlm",), "aqlm[gpu,cpu]"),
    "auto-round": _CheckpointFormat(("auto_round",), "auto-round"),
    "bitnet": _CheckpointFormat(),
    "hqq": _CheckpointFormat(("hqq",), "hqq", cpu=False),
    "quanto": _CheckpointFormat(("optimum.quanto",), "optimum-quanto"),
    "spqr": _CheckpointFormat(("spqr_quant",), "spqr_quant[gpu]", cpu=False),
    "torchao": _CheckpointFormat(("torchao",), "torchao"),
    "vptq": _CheckpointFormat(("vptq",), "vptq", cpu=False),
}
#: The other methods that transformers lists, with the reason why they are not loaded.
REFUSED: Mapping[str, str] = {
    "eetq": _HUB_KERNELS,
    "nvfp4": "transformers loads no checkpoints of it",
    "gguf": "it is a file of its own; name the folder of the model that it was made of",
} | dict.fromkeys(
    ("fouroversix", "fp_quant", "gemma", "higgs", "metal", "quark", "sinq"),
    "it needs a library or a device that batchmill does not know",
)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The quantization of one checkpoint."""

    #: Its name as transformers lists it, bitsandbytes' with its bits.
    method: str
    #: The quantization_config itself.
    written: Mapping[str, Any]

    @classmethod
    def of(cls, config: Any) -> Checkpoint | None:
        """Reads the config of a model, its text model's included; None for weights that are as trained."""
        written = _written(config)
        if written is None:
            return None
        method = str(written.get("quant_method", "unknown"))
        for key, name in (("load_in_4bit", BITSANDBYTES_4BIT), ("load_in_8bit", BITSANDBYTES_8BIT)):
            if written.get(key):
                method = name
        return cls(method, MappingProxyType(written))

    def refuse(self, folder: Path, device: torch.device) -> None:
        """Raises Refusal where this cannot run on this device with what is installed, or would run wrongly."""
        method = _METHODS.get(self.method)
        if method is None:
            why = REFUSED.get(self.method, "transformers does not know it")
            raise Refusal(
                f"its weights are quantized by {self.method!r}, and that is not loaded: {why}; "
                f"loaded are {', '.join(_METHODS)}"
            )
        if not method.cpu and device.type == "cpu":
            raise Refusal(f"its weights are quantized by {self.method}, which runs on a GPU alone; use --device cuda")
        self._refuse_missing(method)
        if self.method == COMPRESSED_TENSORS:
            self._refuse_reordered()
        if self.method in ("fp8", "mxfp8"):
            _refuse_cut_blocks(folder, self.written.get("weight_block_size"))

    def changes(self, device: torch.device) -> dict[str, Any]:
        """The keys to add to the quantization_config, by which weights are dequantized while they are loaded."""
        if not _METHODS[self.method].dequantized:
            return {}
        if self.method == COMPRESSED_TENSORS:
            if device.type == "cuda" and torch.cuda.get_device_capability(device) >= _FP8_CAPABILITY and self._fp8():
                return {"use_optimized_inference": True}
            if len(self._groups()) > 1:
                # Weights of several schemes are told apart by their layers alone, after they are loaded.
                return {"dequantize": False}
        return {"dequantize": True}

    def _refuse_missing(self, method: _CheckpointFormat) -> None:
        missing = [each for each in method.modules if not _installed(each)]
        if missing:
            remedy = f"run: pip install '{method.package}'" if method.package else _NO_EXTRA
            raise Refusal(
                f"its weights are quantized by {self.method}, and of its libraries {' and '.join(missing)} cannot be "
                f"found; {remedy}"
            )

    def _groups(self) -> list[Mapping[str, Any]]:
        """The scheme of compressed-tensors for the weights of each group of layers."""
        groups = self.written.get("config_groups") or {}
        return [each.get("weights") or {} for each in groups.values()]

    def _fp8(self) -> bool:
        groups = self._groups()
        return bool(groups) and all(each.get("type") == "float" and each.get("num_bits") == 8 for each in groups)

    def _refuse_reordered(self) -> None:
        if any(each.get("actorder") in ("group", True) for each in self._groups()):
            raise Refusal(
                "its weights lie in the order of their activations (actorder: group), which compressed-tensors no "
                "longer reads; take another checkpoint, or the original with -q nf4"
            )


def announce(config: Any) -> None:
    """Logs that the completed quantization_config of this config has weights dequantized, if it has, and why."""
    checkpoint = Checkpoint.of(config)
    if checkpoint is not None and "dequantize" in checkpoint.written:
        because = _METHODS[checkpoint.method].dequantized
        log.info(
            "the checkpoint is dequantized; activations stay as they are", method=checkpoint.method, because=because
        )


def _written(config: Any) -> dict[str, Any] | None:
    for each in (config, config.get_text_config(decoder=True)):
        written = getattr(each, "quantization_config", None)
        if written is not None:
            return dict(written if isinstance(written, dict) else written.to_dict())
    return None


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False  # the package that it is in is missing


def _refuse_cut_blocks(folder: Path, block: Any) -> None:
    """Raises Refusal for blocks that a weight's edge cuts: transformers takes them for smaller blocks of one size."""
    if not isinstance(block, list | tuple) or len(block) != 2:
        return
    if not any(folder.glob("*.safetensors")):
        return  # planned before its weights are here; loading checks them first
    shapes = dict(_shapes(folder))
    for name, grid in shapes.items():
        shape = shapes.get(name.removesuffix(_SCALES) + ".weight")
        if not name.endswith(_SCALES) or shape is None or len(grid) != 2 or len(shape) != 2:
            continue
        if any(count > 1 and count * size != length for count, size, length in zip(grid, block, shape, strict=True)):
            raise Refusal(
                f"its {name.removesuffix(_SCALES)} of {shape[0]} x {shape[1]} is no whole number of blocks of "
                f"{block[0]} x {block[1]}, which transformers dequantizes wrongly; take the original with -q nf4"
            )


def _shapes(folder: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Reads every tensor's name and shape from the files' headers."""
    for file in weights(folder):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  (it is no mapping)
                yield name, tuple(opened.get_slice(name).get_shape())
