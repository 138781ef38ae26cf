"""The refusal of a model that will not fit, before any of its weights is read: with the sum, and with what would fit.

Owns what counts as not fitting: the engine could not hold one row beside the weights. That row is of the context that
was asked for, or else of the few tokens that an engine plans with at least. It knows splitting and offloading as advice
alone: worker.models.layout computes how much of those fits.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch

from batchmill.jobs.models.quantization import Kind, Quantization
from batchmill.jobs.models.spec import ModelSpec
from batchmill.jobs.runtime.sizes import size
from batchmill.worker.devices.memory import MemoryReader
from batchmill.worker.devices.selection import CPU
from batchmill.worker.engine.continuous.sizing import ROW_TOKENS
from batchmill.worker.engine.options import Dequantize, EngineOptions
from batchmill.worker.models.vetting import Refusal, weights
from batchmill.worker.plan.choices import choices
from batchmill.worker.plan.fit import SPLIT_PART, Fit
from batchmill.worker.plan.hardware import Hardware
from batchmill.worker.plan.model import PlannedModel
from batchmill.worker.plan.report import fit_of

_DEFAULTS = EngineOptions()
_MOST_CHOICES = 3
#: Bounds of how a file's bytes grow in memory (4 bits that are turned into float32), and of a row's cache.
_LARGEST_GROWTH, _LARGEST_ROW_BYTES = 8, 1024**3
#: Advice splits a model over so many GPUs at most.
_MOST_GPUS = 8


def refuse_too_large(spec: ModelSpec, folder: Path, device: torch.device, options: EngineOptions = _DEFAULTS) -> None:
    """Raises Refusal where this model cannot work on this one device with the memory that is free there now.

    `options`: of the engine that will serve it, which needs room beside the weights.
    """
    free = MemoryReader(str(device)).available_bytes()
    stored = sum(file.stat().st_size for file in weights(folder))
    if _LARGEST_GROWTH * stored + _LARGEST_ROW_BYTES <= free and options.context_tokens is None:
        return
    cuda = device.type == "cuda"
    total = torch.cuda.get_device_properties(device).total_memory if cuda else free
    refuse_beyond(PlannedModel(spec, folder), Hardware(str(device), str(device), cuda, total, free, None), options)


def refuse_beyond(model: PlannedModel, hardware: Hardware, options: EngineOptions) -> None:
    """Raises Refusal where a model whose configuration is known cannot work on this device, which need not be here."""
    row_tokens = min(options.context_tokens or ROW_TOKENS, model.context_tokens or ROW_TOKENS)
    one_row = replace(options, max_rows=1, cache_bytes=None)
    fit = _fit(model, model.spec.quantization, hardware, one_row, row_tokens)
    if fit is None or fit.fits:
        return
    nearest = list(islice(_choices(model, fit, hardware, one_row, row_tokens), _MOST_CHOICES))
    would = f"what would fit: {', '.join(nearest)}" if nearest else "take a smaller model, or a device with more memory"
    raise Refusal(f"it does not fit on {hardware.device}: {_sum(fit, hardware, row_tokens)}; {would}")


def _fit(
    model: PlannedModel, quantization: Quantization, hardware: Hardware, options: EngineOptions, row_tokens: int
) -> Fit | None:
    """Plans this quantization; None where it would be refused for another reason."""
    try:
        holding = model.holding(quantization, hardware.torch_device, context_tokens=options.context_tokens)
    except Refusal:
        return None
    return fit_of(model, holding, hardware, options, row_tokens=row_tokens)


def _sum(fit: Fit, hardware: Hardware, row_tokens: int) -> str:
    spare = "kept free by --gpu-memory-fraction" if hardware.cuda else "for copies and steps"
    parts = (
        ("weights", fit.weights_bytes),
        (f"cache of one row of {row_tokens:,} tokens", fit.cache_bytes),
        ("buffers of a step", fit.buffers_bytes),
        ("copies of 4-bit weights", fit.copied_bytes),
        (spare, fit.spare_bytes),
    )
    added = " + ".join(f"{name} {size(count)}" for name, count in parts if count)
    total = f" of {size(hardware.total_bytes)}" if hardware.cuda else ""
    return f"{added} = {size(fit.needed_bytes)}, and {size(hardware.free_bytes)}{total} are free"


def _choices(
    model: PlannedModel, fit: Fit, hardware: Hardware, options: EngineOptions, row_tokens: int
) -> Iterator[str]:
    """Yields what would fit, the nearest to what was asked for first."""
    quantization = model.spec.quantization
    if fit.copied_bytes:
        uncopied = _fit(model, quantization, hardware, replace(options, dequantize=Dequantize.NEVER), row_tokens)
        if uncopied is not None and uncopied.fits:
            yield f"--dequantize never ({size(uncopied.total_bytes)})"
    yield from _shorter(model, quantization, hardware, options, row_tokens)
    less_precise = _less_precise(model, quantization)
    for each in less_precise:
        smaller = _fit(model, each, hardware, options, row_tokens)
        if smaller is not None and smaller.fits:
            yield f"-q {each} ({size(smaller.total_bytes)})"
    if hardware.cuda:
        yield from _split(model, quantization, hardware, options, row_tokens)
    if quantization.kind is Kind.NONE:
        yield from _offloaded(fit, hardware)
    if hardware.cuda:
        yield from _on_cpu(model, quantization, options, row_tokens)
    for each in less_precise:
        yield from (f"-q {each} {context}" for context in _shorter(model, each, hardware, options, row_tokens))


def _shorter(
    model: PlannedModel, quantization: Quantization, hardware: Hardware, options: EngineOptions, row_tokens: int
) -> Iterator[str]:
    """Yields the longest context that fits, in whole slots of the cache, if one was asked for and a part of it fits."""

    def too_long(slots: int) -> bool:
        tokens = slots * ROW_TOKENS
        fit = _fit(model, quantization, hardware, replace(options, context_tokens=tokens), tokens)
        return fit is None or not fit.fits

    if options.context_tokens is not None and not too_long(1):
        # Counted from 1, so that the place of the first that is too long is how many slots are not.
        slots = bisect_left(range(1, row_tokens // ROW_TOKENS + 1), True, key=too_long)
        if 0 < slots * ROW_TOKENS < row_tokens:
            yield f"--context {slots * ROW_TOKENS}"


def _less_precise(model: PlannedModel, quantization: Quantization) -> list[Quantization]:
    """The less precise choices after the one that was asked for; of two that take the same bytes, one."""
    known = [each for each in choices(model.config) if each.kind is not Kind.FP4]
    kinds = [each.kind for each in known]
    if quantization in known:
        return known[known.index(quantization) + 1 :]
    return known[kinds.index(quantization.kind) :] if quantization.kind in kinds else []


def _split(
    model: PlannedModel, quantization: Quantization, hardware: Hardware, options: EngineOptions, row_tokens: int
) -> Iterator[str]:
    """Yields the smallest number of such GPUs that the model fits on."""
    for count in range(2, _MOST_GPUS + 1):
        together = replace(
            hardware,
            count=count,
            total_bytes=count * hardware.total_bytes,
            free_bytes=count * hardware.free_bytes,
        )
        fit = _fit(model, quantization, together, options, row_tokens)
        if fit is not None and fit.fits:
            yield f"--devices {'+'.join(map(str, range(count)))} ({count} such GPUs)"
            return


def _offloaded(fit: Fit, hardware: Hardware) -> Iterator[str]:
    """Yields the flags that offload what does not fit, which is slow."""
    lacking = fit.needed_bytes - hardware.free_bytes
    if hardware.cuda and lacking <= SPLIT_PART * MemoryReader(CPU).available_bytes():
        yield f"--offload cpu ({size(lacking)} there, and much slower)"
    else:
        yield "--offload disk --offload-folder DIR (and much slower)"


def _on_cpu(model: PlannedModel, quantization: Quantization, options: EngineOptions, row_tokens: int) -> Iterator[str]:
    free = MemoryReader(CPU).available_bytes()
    fit = _fit(model, quantization, Hardware(CPU, CPU, False, free, free, None), options, row_tokens)
    if fit is not None and fit.fits:
        yield f"--device cpu ({size(fit.total_bytes)})"
