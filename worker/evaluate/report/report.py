"""A report as people and as programs read it: a table, a note on the method, and JSON."""

from __future__ import annotations

from typing import Any

from batchmill.jobs.runtime.sizes import size
from batchmill.worker.evaluate.measures.measurement import Failure, Measurement, Report
from batchmill.worker.evaluate.report.advice import advice
from batchmill.worker.evaluate.report.finding import LIMITS

_HEAD = (
    "quantization", "perplexity", "KL mean", "KL p99", "same tokens", "right", "weights", "peak", "tokens/s", "load",
)  # fmt: skip
_NOTHING = "-"


def to_json(report: Report) -> dict[str, Any]:
    """The public JSON of `batchmill evaluate --json`."""
    return {
        "model": report.baseline.model,
        "revision": report.baseline.revision,
        "baseline": report.baseline.quantization.canonical,
        "data": {"name": report.data_name, "sha256": report.data_sha256},
        "device": report.device_name,
        "method": None if report.method is None else report.method.to_json(),
        "results": [_row_json(each) for each in report.rows],
        "advice": advice(report),
        "versions": dict(report.versions),
    }


def lines(report: Report) -> list[str]:
    """The report as lines for people."""
    if not report.measured:
        return _table(report)
    return [*_table(report), "", *_method(report), "", advice(report)]


def _row_json(row: Measurement | Failure) -> dict[str, Any]:
    """The JSON of one row; a spec that failed has the same keys as one that did not."""
    head = {"quantization": row.spec.quantization.canonical}
    if isinstance(row, Failure):
        return head | dict.fromkeys(_KEYS) | {"error": row.reason}
    return head | row.to_json() | {"error": None}


_KEYS = (
    "perplexity", "perplexity_change", "divergence", "agreement", "accuracy", "weights_bytes", "peak_bytes",
    "tokens_per_second", "load_seconds", "engine", "commit",
)  # fmt: skip


def _table(report: Report) -> list[str]:
    rows = [_cells(each, report) for each in report.measured]
    wanted = [at for at in range(len(_HEAD)) if at < 2 or any(row[at] != _NOTHING for row in rows)]
    table = [_HEAD, *rows] if rows else []
    widths = {at: max(len(row[at]) for row in table) for at in wanted} if table else {}
    aligned = ["  ".join(_aligned(row[at], widths[at], at) for at in wanted).rstrip() for row in table]
    return aligned + [f"{each.spec.quantization}: not measured: {each.reason}" for each in report.failed]


def _aligned(cell: str, width: int, at: int) -> str:
    return f"{cell:>{width}}" if at else f"{cell:<{width}}"


def _cells(row: Measurement, report: Report) -> tuple[str, ...]:
    mark = " (baseline)" if row.spec == report.baseline else ""
    divergence, agreement, accuracy = row.divergence, row.agreement, row.accuracy
    return (
        f"{row.spec.quantization}{mark}",
        f"{row.perplexity:,.4f}",
        _NOTHING if divergence is None else f"{divergence.mean:.2g}",
        _NOTHING if divergence is None else f"{divergence.p99:.2g}",
        _NOTHING if agreement is None else f"{agreement.share:.1%}",
        _NOTHING if accuracy is None else f"{accuracy.right}/{accuracy.answers}",
        size(row.weights_bytes),
        size(row.peak_bytes),
        _NOTHING if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}",
        f"{row.load_seconds:.1f} s",
    )


def _method(report: Report) -> list[str]:
    method = report.method
    assert method is not None
    sentences = [
        f"Measured on {report.device_name} with {report.data_name}: {method.tokens:,} tokens in "
        f"{method.windows:,} windows of at most {method.window_tokens:,} tokens, stride {method.stride_tokens:,}."
    ]
    compared = f"{method.divergence_places:,} of them" if method.divergence_places < method.tokens else "all of them"
    if any(each.divergence for each in report.measured):
        sentences.append(f"KL: from {report.baseline.quantization}'s next-token distribution, in nats, at {compared}.")
    if method.continuations:
        sentences.append(
            f"Same tokens: of {method.continuations:,} greedy answers of at most {method.max_tokens:,} tokens, those "
            "before the first other one."
        )
    if len(report.measured) > 1:
        sentences.append(f"Little is lost up to {LIMITS}; each with 95 % certainty.")
    return sentences
