"""Highest speeds of a step, worked out by hand, and speeds that were recorded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sqlalchemy import update

from batchmill.jobs.models.quantization import Quantization
from batchmill.jobs.models.spec import DEMO, ModelSpec
from batchmill.jobs.store.store import Store
from batchmill.jobs.store.tables import runs
from batchmill.worker.engine.options import EngineOptions
from batchmill.worker.plan.hardware import Hardware, Rates, pretended_gpu
from batchmill.worker.plan.report import report
from batchmill.worker.plan.speed import Workload, tokens_per_second
from tests.support.models.shapes import shape
from tests.support.store import mill

GPU = torch.device("cuda")
GIB = 1024**3


@pytest.mark.parametrize(
    ("quantization", "rows", "copied", "expected"),
    [
        ("none", 1, False, 284),
        ("none", 16, False, 4_010),
        ("none", 64, False, 11_661),
        ("none", 256, False, 19_915),
        ("int8:threshold=0", 1, False, 527),
        ("int8:threshold=0", 16, False, 6_760),
        ("nf4", 1, False, 899),
        ("nf4", 16, False, 10_120),
        ("nf4", 64, False, 6_686),
        ("nf4", 256, False, 15_114),
        ("nf4", 64, True, 11_661),
    ],
)
def test_the_floor_of_a_step_is_that_of_known_figures(
    quantization: str, rows: int, copied: bool, expected: int, tmp_path: Path
) -> None:
    """Llama-3.1-8B on a device of 4.3 TB/s and 790 TFLOP/s, with 1,024 tokens of context, worked out by hand."""
    asked = Quantization.parse(quantization)
    holding = shape(tmp_path, "8b").holding(asked, GPU)
    gpu = Hardware("cuda:0", "", True, GIB, GIB, Rates(4.3e12, {torch.bfloat16: 790e12}, ""))
    dtype = torch.int8 if quantization.startswith("int8") else holding.dtype
    work = Workload(holding.footprint, holding.token.bytes, dtype, copied=copied)
    assert tokens_per_second(work, gpu, rows=rows, context_tokens=1024) == pytest.approx(expected, rel=0.01)


def test_the_search_for_outliers_makes_int8_slower_on_a_gpu(tmp_path: Path) -> None:
    model = shape(tmp_path, "8b")
    gpu = pretended_gpu(80 * GIB, name="NVIDIA H200")
    lines = {str(each.quantization): dict(each.speeds) for each in report(model, [gpu], EngineOptions()).devices[0][1]}
    assert lines["int8"][1] < 1.1 * lines["none"][1]


def test_speeds_are_of_this_machine_and_count_overlapping_runs_once(sqlite_url: str, clock: mill.Clock) -> None:
    store = Store(sqlite_url, now=clock.expression())
    mill.load(store, count=8, batch_size=4)
    who = mill.session(store)
    claimed = mill.claim(store, who, wanted=8)
    clock.seconds += 10
    store.leases.sync(who, [mill.answered(each) for each in claimed])
    assert [each.tokens_per_second for each in store.speeds.of(mill.ECHO_SPEC, host="host")] == [8 * 3 / 10]
    with store.database.write() as connection:
        # The second begins when the first is half done, and takes five seconds longer.
        connection.execute(
            update(runs).where(runs.c.batch_id == 2).values(started_at=1_000_005.0, finished_at=1_000_015.0)
        )
    (found,) = store.speeds.of(mill.ECHO_SPEC, host="host")
    assert (found.runs, found.completion_tokens, found.seconds, found.device_name) == (2, 24, 15.0, "cpu")
    assert store.speeds.of(mill.ECHO_SPEC, host="another") == []
    assert store.speeds.of(ModelSpec(DEMO), host="host") == []
    store.close()
