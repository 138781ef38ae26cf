"""The advice on which quantization to take: one plain sentence with the reason and the command.

Owns the choice: of what fits, the most precise, unless another is much faster. It measures nothing.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace

from batchmill.jobs.runtime.sizes import size
from batchmill.worker.plan.hardware import Hardware
from batchmill.worker.plan.report import PlanLine, PlanReport

#: A more precise quantization may take up to this many times as long.
_WORTH = 1.5


@dataclass(frozen=True, slots=True)
class Advice:
    """The quantization to take, and the device to take it on."""

    hardware: Hardware
    line: PlanLine
    #: The most precise quantization that fits, where it is too slow to be taken.
    slower: PlanLine | None = None


def choose(report: PlanReport) -> Advice | None:
    """Chooses on the first device that anything fits on, a GPU before a CPU; None where nothing fits."""
    for hardware, lines in sorted(report.devices, key=lambda each: not each[0].cuda):
        fitting = [each for each in lines if each.fit is not None and each.fit.fits]
        if fitting:
            fastest = max(map(_speed, fitting))
            taken = next(each for each in fitting if _speed(each) * _WORTH >= fastest)
            return Advice(hardware, taken, fitting[0] if taken is not fitting[0] else None)
    return None


def command(report: PlanReport, choice: Advice, *, context_asked: bool) -> str:
    """The command that starts this worker."""
    words = replace(report.spec, quantization=choice.line.quantization).command_line()
    if not choice.hardware.pretended:
        words += ["--device", choice.hardware.device]
    if context_asked:
        words += ["--context", str(report.row_tokens)]
    return shlex.join(words)


def advice(report: PlanReport, *, context_asked: bool) -> str:
    """Returns the advice as one sentence."""
    choice = choose(report)
    if choice is None:
        return _nothing_fits(report)
    lines = next(lines for hardware, lines in report.devices if hardware is choice.hardware)
    taken = choice.line.quantization
    if choice.slower is not None:
        times = _speed(choice.line) / _speed(choice.slower)
        why = f"it fits, and {choice.slower.quantization}, which loses less, is {times:.1f} times slower by the floor"
    elif choice.line is lines[0]:
        faster = "and nothing else is much faster" if choice.line.speeds else "and no speed of this device is known"
        why = f"it fits, loses least of all, {faster}"
    else:
        why = f"of all that fits it loses least, and {lines[0].quantization} does not fit"
    start_command = command(report, choice, context_asked=context_asked)
    return f"Take {taken} on {choice.hardware.device}: {why}. Start it with: {start_command}"


def _nothing_fits(report: PlanReport) -> str:
    planned = [(line.fit.total_bytes, line) for _, lines in report.devices for line in lines if line.fit is not None]
    rows = "a row" if report.rows == 1 else f"{report.rows:,} rows"
    if not planned:
        return "Nothing of this can be loaded here, for the reasons above."
    least, line = min(planned, key=lambda each: each[0])
    split = ", split the model over GPUs with --devices 0+1" if any(each.cuda for each, _ in report.devices) else ""
    return (
        f"Nothing fits: {line.quantization} takes least, {size(least)} with {rows} of {report.row_tokens:,} tokens; "
        f"ask for {'' if report.rows == 1 else 'fewer --rows or '}a smaller --context{split}, or take a smaller model."
    )


def _speed(line: PlanLine) -> float:
    """Tokens per second by the floor, with as many rows as fit; where that is unknown 1, so that precision decides."""
    return line.speeds[-1][1] if line.speeds else 1.0
