"""A report as lines for people and as JSON for programs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from batchmill.jobs.runtime.sizes import size
from batchmill.worker.plan.advice import advice, choose, command
from batchmill.worker.plan.hardware import Hardware, Rates
from batchmill.worker.plan.report import PlanLine, PlanReport

_UNKNOWN = "-"
_HEAD = ("quantization", "weights", "cache/token", "rows", "total", "fits", "tokens/s", "recorded")

#: Columns that a table in a narrow terminal leaves out, one after the other.
_NEEDED_LEAST = ("cache/token", "rows", "recorded", "total", "tokens/s")


def to_lines(report: PlanReport, *, context_asked: bool, width: int | None = None) -> Iterator[str]:
    """Yields the whole report, with the advice at its end; tables are at most `width` wide, if they can be."""
    model = report.spec.model if report.spec.revision is None else f"{report.spec.model}@{report.spec.revision}"
    context = f"{report.context_tokens:,} tokens of context" if report.context_tokens else "no limit of its context"
    yield f"{model}: {_count(report.parameters)} parameters, {context}"
    rows = "1 row" if report.rows == 1 else f"{report.rows:,} rows"
    yield f"planned with rows of {report.row_tokens:,} tokens, prompt and answer; total: weights, buffers and {rows}"
    yield from _notes(report)
    for hardware, lines in _alike(report):
        yield ""
        yield _title(hardware, report.memory_fraction)
        yield from _table([_HEAD, *(_cells(each) for each in lines if not each.refused)], width)
        yield from (f"  {each.quantization}: {each.refused}" for each in lines if each.refused)
    yield ""
    yield "tokens/s: by the floor of a step, for 1 row / the rows that fit; recorded: of this machine's earlier runs"
    yield advice(report, context_asked=context_asked)


def to_json(report: PlanReport, *, context_asked: bool) -> dict[str, Any]:
    """Bytes, tokens and tokens per second as numbers; what is not known is null."""
    choice = choose(report)
    return {
        "model": report.spec.model,
        "revision": report.spec.revision,
        "parameters": report.parameters,
        "context_tokens": report.context_tokens,
        "row_tokens": report.row_tokens,
        "rows": report.rows,
        "devices": [
            _hardware_json(hardware) | {"quantizations": [_line_json(each) for each in lines]}
            for hardware, lines in report.devices
        ],
        "take": None
        if choice is None
        else {
            "device": choice.hardware.device,
            "quantization": choice.line.quantization.canonical,
            "command": command(report, choice, context_asked=context_asked),
        },
        "advice": advice(report, context_asked=context_asked),
    }


def _notes(report: PlanReport) -> Iterator[str]:
    """Yields what holds for the model on every device."""
    token = next((each.holding.token for _, lines in report.devices for each in lines if each.holding), None)
    if any(hardware.count > 1 for hardware, _ in report.devices):
        yield "a model that is split over devices is served by the generate engine"
    if token is not None and not token.continuous:
        yield f"the generate engine serves it, which takes more memory a token: {token.reason}"
    if token is not None and token.window_tokens:
        kept = "the cache keeps what they no longer see" if token.continuous else "the cache keeps no more of them"
        yield f"some of its layers see {token.window_tokens:,} tokens; {kept}"


def _alike(report: PlanReport) -> list[tuple[Hardware, tuple[PlanLine, ...]]]:
    """Shows devices of one name and the same lines as one, with the free memory of the fullest."""
    groups: dict[tuple[object, ...], tuple[Hardware, tuple[PlanLine, ...]]] = {}
    for hardware, lines in report.devices:
        key = hardware.name, *(each.refused or _cells(each) for each in lines)
        if key in groups:
            first = groups[key][0]
            free = min(first.free_bytes, hardware.free_bytes)
            hardware = replace(first, device=f"{first.device}, {hardware.device}", free_bytes=free)
        groups[key] = hardware, lines
    return list(groups.values())


def _title(hardware: Hardware, memory_fraction: float) -> str:
    named = hardware.device if hardware.device == hardware.name else f"{hardware.device} ({hardware.name})"
    planned = f", {memory_fraction:.0%} of it planned with" if hardware.cuda and memory_fraction < 1 else ""
    free, total = size(hardware.free_bytes), size(hardware.total_bytes)
    return f"{named}: {free} of {total} free{planned}; {_rates(hardware.rates)}"


def _rates(rates: Rates | None) -> str:
    if rates is None:
        return "its speed is not known"
    operations = max(rates.operations_per_second.values())
    return f"{rates.bytes_per_second / 1e9:,.0f} GB/s and {operations / 1e12:,.3g} TFLOP/s ({rates.source})"


def _cells(line: PlanLine) -> tuple[str, ...]:
    assert line.holding is not None
    assert line.fit is not None
    name = line.quantization.canonical
    if name == "none":
        name += f" ({str(line.holding.dtype).removeprefix('torch.')})"
    return (
        name,
        size(line.holding.footprint.weights_bytes),
        size(line.holding.token.bytes),
        f"{line.fit.rows:,}",
        size(line.fit.total_bytes),
        "yes" if line.fit.fits else "no",
        " / ".join(_rate(speed) for _, speed in line.speeds) or _UNKNOWN,
        _rate(line.recorded.tokens_per_second) if line.recorded is not None else _UNKNOWN,
    )


def _table(rows: Sequence[Sequence[str]], width: int | None) -> Iterator[str]:
    """Aligns the first column to the left, the others to the right."""
    for title in _NEEDED_LEAST:
        if width is None or sum(_widths(rows)) + 2 * len(rows[0]) <= width:
            break
        left_out = rows[0].index(title)
        rows = [[*row[:left_out], *row[left_out + 1 :]] for row in rows]
    widths = _widths(rows)
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(each.rjust(width) for each, width in zip(row[1:], widths[1:], strict=True))]
        yield "  " + "  ".join(cells).rstrip()


def _widths(rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(*rows, strict=True)]


def _hardware_json(hardware: Hardware) -> dict[str, Any]:
    rates = hardware.rates
    return {
        "device": hardware.device,
        "name": hardware.name,
        "pretended": hardware.pretended,
        "total_bytes": hardware.total_bytes,
        "free_bytes": hardware.free_bytes,
        "bytes_per_second": rates.bytes_per_second if rates else None,
        "operations_per_second": {
            str(dtype).removeprefix("torch."): rate for dtype, rate in rates.operations_per_second.items()
        }
        if rates
        else None,
        "rates_source": rates.source if rates else None,
    }


def _line_json(line: PlanLine) -> dict[str, Any]:
    if line.holding is None or line.fit is None:
        return {"quantization": line.quantization.canonical, "refused": line.refused}
    footprint, token, fit = line.holding.footprint, line.holding.token, line.fit
    recorded = line.recorded
    return {
        "quantization": line.quantization.canonical,
        "refused": None,
        "dtype": str(line.holding.dtype).removeprefix("torch."),
        "weights_bytes": footprint.weights_bytes,
        "scales_bytes": footprint.scales_bytes,
        "copied_bytes": fit.copied_bytes,
        "buffers_bytes": fit.buffers_bytes,
        "cache_token_bytes": token.bytes,
        "engine": fit.limits.kind,
        "engine_rows": fit.limits.rows,
        "cache_tokens": fit.limits.cache_tokens,
        "rows": fit.rows,
        "total_bytes": fit.total_bytes,
        "fits": fit.fits,
        "floor_tokens_per_second": {str(rows): speed for rows, speed in line.speeds} or None,
        "recorded_tokens_per_second": recorded.tokens_per_second if recorded else None,
        "recorded_runs": recorded.runs if recorded else 0,
    }


def _rate(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.1f}"


def _count(number: int) -> str:
    for unit, name in ((10**9, "billion"), (10**6, "million")):
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return f"{number:,}"
