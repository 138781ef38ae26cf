"""Prints a contest: the machine, a table of the contestants' rates, and how our engine spent its time."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean, median

from batchmill.jobs import VERSION
from tests.tools.bench.contest import Entry
from tests.tools.bench.contestant import Measured
from tests.tools.bench.workloads import Workload

_PACKAGES = ("torch", "transformers", "bitsandbytes", "ctranslate2", "llama_cpp_python")


def heading(threads: int) -> str:
    versions = [f"{name} {found}" for name in _PACKAGES if (found := _version(name))]
    return "\n".join(
        [
            f"batchmill {VERSION}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
            f"{_processor()}, {os.cpu_count()} cores, {threads} threads for everyone, {platform.platform()}",
            f"Python {platform.python_version()}, {', '.join(versions)}",
            "",
        ]
    )


def table(title: str, asked: Workload, entries: Sequence[Entry]) -> str:
    """The first entry is what the others are compared with."""
    lines = [
        f"### {title}, workload {asked.name}",
        f"{asked.title}: {len(asked.asks)} requests, {asked.prompt_tokens:,} prompt tokens, "
        f"{asked.answer_tokens:,} generated",
        "",
    ]
    best = _median(entries[0].runs) if entries[0].runs else None
    rows: list[tuple[str, ...]] = [
        ("", "weights", "setting", "tokens/s", "least - most", "seconds", "first / this"),
        *(_row(entry, best) for entry in entries),
    ]
    lines += aligned(rows)
    for entry in entries:
        lines += _split(entry)
    return "\n".join([*lines, ""])


def agreement(title: str, found: Mapping[str, str]) -> str:
    lines = aligned([("", "tokens before the first that differs from generate's"), *found.items()])
    return "\n".join([f"### {title}", *lines, ""])


def _row(entry: Entry, best: float | None) -> tuple[str, ...]:
    name = entry.kind.name if entry.kind.most is None else f"{entry.kind.name} (the first {entry.kind.most})"
    if entry.failed:
        return (name, entry.weights, entry.failed, "", "", "", "")
    rates = [run.tokens_per_second for run in entry.runs]
    seconds = median(run.seconds for run in entry.runs)
    ratio = "" if best is None else f"{best / median(rates):.2f}"
    span = f"{rate(min(rates))} - {rate(max(rates))}"
    return (name, entry.weights, entry.runs[-1].setting, rate(median(rates)), span, f"{seconds:.2f}", ratio)


def rate(tokens_per_second: float) -> str:
    return f"{tokens_per_second:,.0f}" if tokens_per_second >= 100 else f"{tokens_per_second:.1f}"


def _median(runs: Sequence[Measured]) -> float:
    return median(run.tokens_per_second for run in runs)


def _split(entry: Entry) -> list[str]:
    """The engine's time by part, in the mean of its runs."""
    parts = _mean_split(entry.runs)
    whole = sum(parts.values())
    if not whole:
        return []
    shares = [(part, f"{seconds:.3f}", f"{seconds / whole:.1%}") for part, seconds in parts.items()]
    return ["", f"{entry.kind.name}, its own time:", *aligned([("part", "seconds", "share"), *shares])]


def _mean_split(runs: Sequence[Measured]) -> Mapping[str, float]:
    parts = runs[0].answers.split if runs else {}
    return {part: mean(run.answers.split[part] for run in runs) for part in parts}


def aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(row: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"

    return [line(rows[0]), "|" + "|".join("-" * (width + 2) for width in widths) + "|", *map(line, rows[1:])]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """The processor's name, and the one extension that NF4's fused kernels need."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return platform.processor() or platform.machine()
    told = dict(line.split("\t", 1) for line in path.read_text().splitlines() if "\t" in line)
    name = told.get("model name", platform.machine()).strip(" \t:")
    return f"{name} with AVX512-bf16" if "avx512_bf16" in told.get("flags", "") else name
