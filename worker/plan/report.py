"""The report on a model on some devices: for each quantization its bytes, what fits, and how fast.

Puts the parts of this package together. It prints nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from batchmill.jobs.models.quantization import Kind, Quantization
from batchmill.jobs.models.spec import ModelSpec
from batchmill.jobs.store.views.measured_speeds import Speed
from batchmill.worker.engine.continuous.sizing import CONTEXT_TOKENS, MEMORY_FRACTION
from batchmill.worker.engine.options import EngineOptions
from batchmill.worker.engine.sizing import Load
from batchmill.worker.models.vetting import Refusal
from batchmill.worker.plan.choices import choices
from batchmill.worker.plan.fit import Fit, fit
from batchmill.worker.plan.hardware import Hardware
from batchmill.worker.plan.model import PlannedModel, QuantizedModel
from batchmill.worker.plan.speed import Workload, expert_part, tokens_per_second


@dataclass(frozen=True, slots=True)
class PlanLine:
    """One quantization on one device."""

    quantization: Quantization
    #: The reason why a worker would not load it; then all else is empty.
    refused: str = ""
    holding: QuantizedModel | None = None
    fit: Fit | None = None
    #: Rows and their tokens per second by the floor, for one row and for as many as fit; empty for unknown rates.
    speeds: tuple[tuple[int, float], ...] = ()
    #: The speed of this machine's workers so far.
    recorded: Speed | None = None


@dataclass(frozen=True, slots=True)
class PlanReport:
    """A model planned on some devices."""

    spec: ModelSpec
    parameters: int
    #: The model's own context; None for no limit.
    context_tokens: int | None
    #: Tokens that a row is planned with.
    row_tokens: int
    #: Rows that were asked for, or 1.
    rows: int
    #: The part of a GPU's memory that a worker uses.
    memory_fraction: float
    #: The lines of each device, most precise first.
    devices: tuple[tuple[Hardware, tuple[PlanLine, ...]], ...]


def report(
    model: PlannedModel, devices: Sequence[Hardware], options: EngineOptions, recorded: Sequence[Speed] = ()
) -> PlanReport:
    """Plans every quantization of this model on these devices, for a worker with these options.

    Where the options name no context, a row is planned with the model's own, or with 4,096 tokens where that is less.
    Raises what transformers raises for a configuration that makes no model.
    """
    own = model.context_tokens or CONTEXT_TOKENS
    row_tokens = min(options.context_tokens or CONTEXT_TOKENS, own)
    if options.context_tokens is not None:
        options = replace(options, context_tokens=row_tokens)
    planned = []
    for hardware in devices:
        speeds = {each.quantization: each for each in recorded if each.device_name == hardware.name}
        lines = [_line(model, each, hardware, options, row_tokens, speeds.get(each)) for each in choices(model.config)]
        planned.append((hardware, tuple(_without_doubles(lines))))
    return PlanReport(
        model.spec,
        model.parameters,
        model.context_tokens,
        row_tokens,
        options.max_rows or 1,
        options.memory_fraction or MEMORY_FRACTION,
        tuple(planned),
    )


def _line(
    model: PlannedModel,
    quantization: Quantization,
    hardware: Hardware,
    options: EngineOptions,
    row_tokens: int,
    recorded: Speed | None,
) -> PlanLine:
    try:
        holding = model.holding(quantization, hardware.torch_device, context_tokens=options.context_tokens)
    except Refusal as refusal:
        return PlanLine(quantization, refused=str(refusal))
    fitting = fit_of(model, holding, hardware, options, row_tokens=row_tokens)
    work = Workload(
        holding.footprint,
        holding.token.bytes,
        torch.int8 if quantization.kind is Kind.INT8 else holding.dtype,
        copied=fitting.copied_bytes > 0,
        outliers=quantization.kind is Kind.INT8 and quantization.threshold > 0,
        expert_part=expert_part(model.config.get_text_config()),
    )
    speeds = []
    for rows in sorted({1, max(1, fitting.rows)}):
        speed = tokens_per_second(work, hardware, rows=rows, context_tokens=row_tokens)
        if speed is not None:
            speeds.append((rows, speed))
    return PlanLine(quantization, "", holding, fitting, tuple(speeds), recorded)


def fit_of(
    model: PlannedModel, holding: QuantizedModel, hardware: Hardware, options: EngineOptions, *, row_tokens: int
) -> Fit:
    """Plans a worker with these options that holds this model on this device."""
    load = Load(
        holding.footprint.weights_bytes,
        holding.footprint.copy_bytes,
        holding.token.bytes,
        model.context_tokens,
        model.vocabulary,
    )
    return fit(load, hardware, options, is_continuous=holding.token.continuous, row_tokens=row_tokens)


def _without_doubles(lines: Sequence[PlanLine]) -> list[PlanLine]:
    """Leaves `none` in bfloat16 out where `none` is of 16 bits, or is refused."""
    plain = next((each for each in lines if each.quantization.canonical == Kind.NONE), None)
    wide = plain is not None and plain.holding is not None and plain.holding.dtype is torch.float32
    return [
        each
        for each in lines
        if each is plain or each.quantization.kind is not Kind.NONE or (wide and not each.refused)
    ]
