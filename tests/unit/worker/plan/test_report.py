"""The report of a plan: its table, its advice, and recorded speeds beside the floor."""

from __future__ import annotations

from pathlib import Path

from batchmill.jobs.models.quantization import Quantization
from batchmill.jobs.models.spec import DEMO, DEMO_FOLDER, ModelSpec
from batchmill.jobs.store.views.measured_speeds import Speed
from batchmill.worker.engine.options import EngineOptions
from batchmill.worker.plan.advice import advice
from batchmill.worker.plan.hardware import Hardware, pretended_gpu, this_cpu
from batchmill.worker.plan.model import PlannedModel
from batchmill.worker.plan.report import report
from batchmill.worker.plan.table import to_lines
from tests.support.models.shapes import shape

GIB = 1024**3


def test_a_configuration_alone_is_enough(tmp_path: Path) -> None:
    model = shape(tmp_path, "7b")
    assert list(tmp_path.iterdir()) == [tmp_path / "config.json"]
    said = list(to_lines(report(model, [pretended_gpu(24 * GIB)], EngineOptions()), context_asked=False))
    assert "6.74 billion parameters, 4,096 tokens of context" in said[0]


def test_a_table_in_a_narrow_terminal_has_fewer_columns(tmp_path: Path) -> None:
    planned = report(shape(tmp_path, "7b"), [pretended_gpu(24 * GIB)], EngineOptions())
    rows = [each for each in to_lines(planned, context_asked=False, width=40) if each.startswith("  ")]
    assert rows[0].split() == ["quantization", "weights", "fits"]
    assert max(map(len, rows)) <= 40


def test_the_most_precise_that_fits_is_taken_unless_another_is_much_faster(tmp_path: Path) -> None:
    model = shape(tmp_path, "7b")

    def said(gpu: Hardware) -> str:
        return advice(report(model, [gpu], EngineOptions()), context_asked=False)

    assert said(pretended_gpu(16 * GIB)).startswith("Take int8 on a GPU of 16.0 GiB: of all that fits it loses least,")
    assert said(pretended_gpu(24 * GIB)).startswith("Take none on a GPU of 24.0 GiB: it fits, loses least of all,")
    fast = said(pretended_gpu(24 * GIB, name="NVIDIA GeForce RTX 4090"))
    assert "none, which loses less, is 2.5 times slower by the floor. Start it with: batchmill worker -m" in fast
    assert said(pretended_gpu(4 * GIB)).startswith("Nothing fits: nf4 takes least, 6.0 GiB with a row of 4,096 tokens")


def test_gpus_of_which_the_same_is_to_be_said_are_shown_once(tmp_path: Path) -> None:
    model = shape(tmp_path, "7b")
    one, two = (Hardware(f"cuda:{index}", "a", True, 24 * GIB, 23 * GIB - index, None) for index in range(2))
    full = Hardware("cuda:2", "a", True, 24 * GIB, GIB, None)
    said = list(to_lines(report(model, [one, two, full], EngineOptions()), context_asked=False))
    assert [line.partition(" (a)")[0] for line in said if " (a)" in line] == ["cuda:0, cuda:1", "cuda:2"]


def test_what_was_recorded_stands_beside_the_floor(tmp_path: Path) -> None:
    recorded = [
        Speed(Quantization.parse("nf4"), "cpu", 3, 1000, 10.0),
        Speed(Quantization.parse("none"), "NVIDIA H200", 1, 7, 1.0),
    ]
    planned = report(PlannedModel(ModelSpec(DEMO), DEMO_FOLDER), [this_cpu(measured=False)], EngineOptions(), recorded)
    said = [line for line in to_lines(planned, context_asked=False) if line.split()[:1] in (["nf4"], ["none"])]
    assert [line.split()[-1] for line in said] == ["-", "100"]
    assert [line.split()[-2] for line in said] == ["-", "-"], "of a device whose rates are not known there is no floor"
