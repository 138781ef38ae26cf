"""The benchmark of decoding, on a CPU with the bundled model: what is reckoned of a run, and what the table says."""

from __future__ import annotations

import argparse
import json
from contextlib import closing
from importlib import import_module
from pathlib import Path

import pytest
import torch

from batchmill.jobs.models.quantization import Quantization
from batchmill.jobs.models.spec import DEMO_FOLDER
from batchmill.worker.engine.continuous.engine import ContinuousEngine
from batchmill.worker.plan.hardware import Hardware, Rates
from tests.tools.bench import decode
from tests.tools.bench.contestant import Setup
from tests.tools.bench.decoders import EngineDecoder, GenerateDecoder
from tests.tools.bench.floor import floor_of
from tests.tools.bench.models import SHAPES
from tests.tools.bench.score import Ground, Score, table
from tests.tools.bench.timeline import Timeline
from tests.tools.bench.turns import Plan

PLAN = Plan(context_tokens=64, answer_tokens=8, rounds=1, threads=1)
RATES = Rates(1e12, {torch.bfloat16: 1e14, torch.float32: 1e13}, "made up")
DEVICE = Hardware("cpu", "cpu", False, 2**40, 2**40, RATES)


def test_rows_decode_from_the_last_first_token_to_the_first_last_one() -> None:
    run = Timeline([[1.0, 3.0, 4.0, 5.0], [2.0, 3.0, 4.0], [2.0, 3.0, 4.0, 5.0]])
    assert (run.prefill_seconds, run.decode_seconds, run.decode_tokens) == (2.0, 2.0, 6)
    assert run.decode_tokens_per_second == 3.0
    assert Timeline([[1.0, 2.0], [3.0, 4.0]]).decode_tokens_per_second is None


@pytest.mark.parametrize("kind", [EngineDecoder, GenerateDecoder])
def test_every_token_of_a_run_has_its_moment(kind: type[EngineDecoder | GenerateDecoder]) -> None:
    decoder = kind()
    decoder.setup = Setup("cpu", rows=4, context_tokens=256)
    decoder.load(DEMO_FOLDER, "none", torch.get_num_threads())
    workload = PLAN.decoding(DEMO_FOLDER, 3, shared=kind is EngineDecoder)
    decoder.ready(workload, "")
    run = decoder.run(workload, "").timeline
    assert run is not None
    assert [len(each) for each in run.times] == [8, 8, 8]
    assert all(list(each) == sorted(each) for each in run.times)
    assert run.decode_tokens >= 3 * 5, "all rows decode after a few steps"
    assert run.peak_bytes > 0


def test_rows_are_asked_for_the_context_that_was_named() -> None:
    decoding, reading = PLAN.decoding(DEMO_FOLDER, 3, shared=True), PLAN.prefill(DEMO_FOLDER, 100)
    lengths = {(len(each.tokens), each.answer_tokens) for each in decoding.asks}
    assert lengths == {(60, 8)}
    assert len({each.tokens[:-4] for each in decoding.asks}) == 1
    assert len({each.tokens for each in reading.asks}) == len(reading.asks) == 64
    assert {each.answer_tokens for each in reading.asks} == {1}


def test_what_is_left_of_a_run_is_not_shared_with_the_next() -> None:
    decoder = EngineDecoder()
    decoder.setup = Setup("cpu", rows=4, context_tokens=256)
    decoder.load(DEMO_FOLDER, "none", torch.get_num_threads())
    engine: ContinuousEngine = decoder._engine
    with closing(engine):
        decoder.run(PLAN.prefill(DEMO_FOLDER, 3), "")
        assert any(row.blocks for row in engine._schedule._kept)
        decoder.ready(PLAN.prefill(DEMO_FOLDER, 3), "")
        assert not any(row.blocks for row in engine._schedule._kept)


def test_the_floor_of_a_prompt_counts_the_blocks_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    precision = import_module("batchmill.worker.models.quantization.quantization_config")
    monkeypatch.setattr(precision, "has_avx512bf16", lambda: True)  # on whatever CPU
    shape = SHAPES["8b"]
    assert shape is not None
    config = json.loads((DEMO_FOLDER / "config.json").read_text()) | {
        "hidden_size": shape.hidden, "intermediate_size": shape.intermediate, "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "vocab_size": shape.vocabulary,
        "head_dim": 128, "tie_word_embeddings": False,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    for spelled in ("none:dtype=bfloat16", "nf4"):
        floor = floor_of(tmp_path, Quantization.parse(spelled), torch.device("cpu"))
        assert floor.block_parameters == pytest.approx(6.98e9, rel=0.001)
        assert floor.prefill(DEVICE) == pytest.approx(1e14 / (2 * 6.98e9), rel=0.001)


def test_a_table_has_a_row_for_what_failed_and_no_empty_columns() -> None:
    floor = floor_of(DEMO_FOLDER, Quantization.parse("none"), torch.device("cpu"))
    run = Timeline([[1.0, 2.0, 3.0]] * 2, 2**20, {"cache": 2**10}, {"CUDA graphs": "no"})
    ours = Score("demo", "none", 2, "ours", floor, [run], [run], prompt_tokens=10)
    theirs = Score("demo", "none", 2, "theirs", floor, [Timeline([[1.0, 3.0, 5.0]] * 2)], best=ours)
    broken = Score("demo", "none", 64, "theirs", floor, failed="no memory is left")
    lines = table([ours, theirs, broken], Ground(DEVICE, DEVICE, context_tokens=64)).splitlines()
    head, first, second, third = ([cell.strip() for cell in line.split("|")] for line in (lines[0], *lines[2:5]))
    assert "weights" not in head
    assert "of the data sheet's" not in head
    assert first[head.index("decode tokens/s")] == "2.0"
    assert first[head.index("prompt tokens/s")] == "10.0"
    assert (first[head.index("peak")], first[head.index("cache")]) == ("1.0 MiB", "1.0 KiB")
    assert (second[head.index("decode tokens/s")], second[head.index("first / this")]) == ("1.0", "2.00")
    assert third[head.index("decode tokens/s")] == "no memory is left"


def test_what_matters_most_is_measured_first() -> None:
    found = decode._quantizations("int8,none,nf4:compute_dtype=float16,double_quant=false,int8:threshold=0,nf4")
    spelled = [str(each) for each in found]
    assert spelled == ["nf4", "none", "int8:threshold=0", "int8", "nf4:compute_dtype=float16,double_quant=false"]
    assert decode._rows("1,16,64,3") == [64, 16, 1, 3]
    with pytest.raises(argparse.ArgumentTypeError, match="unknown quantization 'nf5'"):
        decode._quantizations("nf4,nf5")
