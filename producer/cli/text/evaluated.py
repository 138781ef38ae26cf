"""The measured cost of quantization for a job's model, in one line for people. It knows no store."""

from __future__ import annotations

from batchmill.jobs.store.views.evaluations import EvaluationRow


def evaluated_line(row: EvaluationRow) -> str:
    """Perplexity, its distance from the baseline's, right answers where the data had some, and the data's name."""
    found, baseline = row.measured, row.baseline
    said = f"perplexity {found['perplexity']:,.4f}"
    if baseline is not None and baseline != row.spec:
        change = found["perplexity"] / found["baseline_perplexity"] - 1
        said += f" ({change:+.1%} against {baseline.quantization})"
    if found["accuracy"] is not None:
        said += f", {found['accuracy']['right']:,} of {found['accuracy']['answers']:,} answers right"
    return f"{said}, with {row.data.name} on {row.device_name}"
