"""A chart of a report: quality against memory, and against speed.

Drawn by matplotlib, which is optional: `check` says so before any work is done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from batchmill.jobs.errors import UsageError
from batchmill.jobs.runtime.files.output_file import check_target, replaced

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from batchmill.worker.evaluate.measures.measurement import Measurement, Report

ENDINGS = (".png", ".svg")
_MIB = 1024**2
_GIB = 1024**3


def check(path: Path, *, keep: Iterable[str | Path]) -> None:
    """Raises UsageError for what could not be written at the end, or is one of `keep`."""
    if path.suffix.lower() not in ENDINGS:
        raise UsageError(f"-o {path}: a chart is a {' or '.join(ENDINGS)} file")
    check_target(path, keep=keep)
    if find_spec("matplotlib") is None:
        raise UsageError("a chart needs matplotlib, which is not installed: pip install 'batchmill[chart]'")


def draw(report: Report, path: Path) -> None:
    """Writes the chart. Raises WriteFailed for a file that cannot be written."""
    import matplotlib

    with matplotlib.rc_context():
        # A matplotlibrc of the current folder comes first, and can have LaTeX run.
        matplotlib.rcdefaults()
        _draw(report, path)


def _draw(report: Report, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    memory, speed = figure.subplots(1, 2, sharey=True)
    unit, name = (_GIB, "GiB") if any(each.weights_bytes > _GIB for each in report.measured) else (_MIB, "MiB")
    _plot(memory, report, lambda each: each.weights_bytes / unit)
    _plot(speed, report, lambda each: each.tokens_per_second)
    memory.set(xlabel=f"weights, {name}", ylabel="perplexity (lower is better)")
    speed.set(xlabel="generated tokens per second")
    figure.suptitle(f"{Path(report.baseline.model).name} on {report.data_name}, {report.device_name}")
    with replaced(path, binary=True) as file:
        figure.savefig(file, dpi=150, format=path.suffix[1:].lower())


def _plot(axes: Axes, report: Report, place_of: Callable[[Measurement], float | None]) -> None:
    """A named point for each row that has a place on this axis, which begins at 0."""
    points = [(place, each) for each in report.measured if (place := place_of(each)) is not None]
    right = max((place for place, _ in points), default=1.0)
    for place, each in points:
        colour = "tab:orange" if each is report.reference else "tab:blue"
        axes.plot(place, each.perplexity, "o", color=colour)
        far = place > right / 2
        axes.annotate(
            _label(each),
            (place, each.perplexity),
            xytext=(-6 if far else 6, 6),
            textcoords="offset points",
            ha="right" if far else "left",
        )
    axes.grid(alpha=0.3)
    axes.margins(y=0.2)
    axes.set_xlim(0, 1.1 * right)
    axes.ticklabel_format(useOffset=False)


def _label(each: Measurement) -> str:
    accuracy = "" if each.accuracy is None else f" ({each.accuracy.share:.0%} right)"
    return f"{each.spec.quantization}{accuracy}"
