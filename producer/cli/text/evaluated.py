"""The measured cost of quantization for a job's model, in one line for people. It knows no store."""

from __future__ import annotations

from batchmill.jobs.store.views.evaluations import EvaluationRow


def evaluated_line(row: EvaluationRow) -> str:
    """Perplexity, its distance from the baseline's, right answers where the data had some, and the data's name."""
    measured, baseline = row.measured, row.baseline
    line = f"perplexity {measured['perplexity']:,.4f}"
    if baseline is not None and baseline != row.spec:
        change = measured["perplexity"] / measured["baseline_perplexity"] - 1
        line += f" ({change:+.1%} against {baseline.quantization})"
    if measured["accuracy"] is not None:
        line += f", {measured['accuracy']['right']:,} of {measured['accuracy']['answers']:,} answers right"
    return f"{line}, with {row.data.name} on {row.device_name}"
