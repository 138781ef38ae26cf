"""The fit of a model is counted as the engines count; a model too large is refused before its weights are read."""

from __future__ import annotations

from contextlib import closing
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from batchmill.jobs.errors import ModelError
from batchmill.jobs.models.quantization import Quantization
from batchmill.jobs.models.spec import DEMO, DEMO_FOLDER, ModelSpec
from batchmill.worker.devices.memory import MemoryReader
from batchmill.worker.devices.placement import Placement
from batchmill.worker.engine.continuous import sizing
from batchmill.worker.engine.continuous.engine import ContinuousEngine
from batchmill.worker.engine.generate.engine import GenerateEngine
from batchmill.worker.engine.options import Dequantize, EngineOptions
from batchmill.worker.engine.sizing import Load
from batchmill.worker.models.load import load
from batchmill.worker.models.vetting import Refusal
from batchmill.worker.plan.fit import fit
from batchmill.worker.plan.hardware import Hardware, joined, pretended_gpu
from batchmill.worker.plan.model import PlannedModel
from batchmill.worker.plan.refusal import refuse_beyond, refuse_too_large
from batchmill.worker.plan.report import fit_of
from tests.tools.bench.models import checkpoint

GIB = 1024**3
CPU = torch.device("cpu")
QUANTIZATIONS = ("none", "int8", "nf4:double_quant=false", "nf4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """42 million parameters in the blocks: large enough that a row of the cache is less than the weights."""
    return checkpoint(tmp_path_factory.mktemp("models"), "45m")


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets what is free everywhere."""
    return lambda count: monkeypatch.setattr(MemoryReader, "available_bytes", lambda _: count)


@pytest.fixture
def computes_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """4-bit weights are multiplied in bfloat16, whichever CPU this is; on some it is float32, of twice the bytes."""
    monkeypatch.setattr(
        import_module("batchmill.worker.models.quantization.quantization_config"), "has_avx512bf16", lambda: True
    )


def spec(folder: Path, quantization: str) -> ModelSpec:
    return ModelSpec(str(folder), quantization=Quantization.parse(quantization))


def cpu(free: int) -> Hardware:
    return Hardware("cpu", "cpu", False, free, free, None)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize(
    "options",
    [
        EngineOptions(),
        EngineOptions(cache_bytes=2 * 1024**2),
        EngineOptions(cache_bytes=700_000, context_tokens=300),
        EngineOptions(max_rows=5, context_tokens=100),
        EngineOptions(cache_bytes=40_000),
        EngineOptions(max_rows=3, dequantize=Dequantize.NEVER),
    ],
)
def test_a_plan_says_what_a_started_worker_says(quantization: str, options: EngineOptions, pretend: Any) -> None:
    pretend(64 * 1024**2)
    loaded = load(ModelSpec(DEMO, quantization=Quantization.parse(quantization)), "cpu")
    with closing(ContinuousEngine(loaded, options=options)) as engine:
        started = engine.limits
    model = PlannedModel(ModelSpec(DEMO), DEMO_FOLDER)
    holding = model.holding(Quantization.parse(quantization), CPU)
    # The free memory while an engine starts is without weights and copies, which are loaded already.
    there = holding.footprint.weights_bytes + (
        0 if options.dequantize is Dequantize.NEVER else holding.footprint.copy_bytes
    )
    fitted = fit_of(model, holding, cpu(64 * 1024**2 + there), options, row_tokens=50)
    assert fitted.limits == started
    assert loaded.weights_bytes == pytest.approx(holding.footprint.weights_bytes, rel=0.01)


def test_a_plan_says_what_the_generate_engine_says(pretend: Any) -> None:
    pretend(10 * 1024**2)
    loaded = load(ModelSpec(DEMO, quantization=Quantization.parse("none")), "cpu")
    engine = GenerateEngine(loaded)
    asked = Load(1000, 0, loaded.cache_token_bytes, 512, 320)
    fitted = fit(asked, cpu(10 * 1024**2 + 1000), EngineOptions(), is_continuous=False, row_tokens=100)
    assert fitted.limits == engine.limits
    assert fitted.limits.cache_tokens == engine.capacity.limit
    assert fitted.rows == engine.capacity.limit // 100


def test_a_gpu_has_what_its_fraction_leaves_beside_weights_and_buffers() -> None:
    gpu = Hardware("cuda:0", "a GPU", True, 24 * GIB, 23 * GIB, None)
    asked = Load(14 * GIB, 0, 128 * 1024, 8192, 128_256)
    fitted = fit(asked, gpu, EngineOptions(), is_continuous=True, row_tokens=4096)
    left = 23 * GIB - 14 * GIB - 14 * GIB // sizing.BUFFERS_PART - 24 * GIB // 10
    assert fitted.rows == left // (128 * 1024 * 4096) == 10
    assert fitted.fits
    assert fitted.total_bytes == 14 * GIB + 14 * GIB // 10 + 4096 * 128 * 1024
    assert not fit(asked, gpu, EngineOptions(max_rows=11), is_continuous=True, row_tokens=4096).fits
    more = EngineOptions(max_rows=11, memory_fraction=1.0)
    assert fit(asked, gpu, more, is_continuous=True, row_tokens=4096).fits


def test_a_large_vocabulary_runs_in_fewer_rows_on_a_cpu() -> None:
    fitted = [
        fit(Load(GIB, 0, 1024, 4096, vocabulary), cpu(24 * GIB), EngineOptions(), is_continuous=True, row_tokens=64)
        for vocabulary in (32_000, 128_256, 262_144)
    ]
    assert [each.limits.rows for each in fitted] == [256, 130, 64]


def test_weights_larger_than_a_device_fit_no_row() -> None:
    asked = Load(30 * GIB, 0, 1024, None, 32_000)
    fitted = fit(asked, pretended_gpu(24 * GIB), EngineOptions(), is_continuous=True, row_tokens=64)
    assert (fitted.rows, fitted.fits) == (0, False)


def test_a_model_over_two_gpus_has_their_memory_together() -> None:
    two = joined([Hardware(f"cuda:{index}", "one", True, 24 * GIB, 22 * GIB, None) for index in range(2)])
    assert (two.device, two.name, two.total_bytes, two.free_bytes) == ("cuda:0+cuda:1", "2 x one", 48 * GIB, 44 * GIB)
    fitted = fit(Load(30 * GIB, 0, 1024, None, 32_000), two, EngineOptions(), is_continuous=True, row_tokens=64)
    assert fitted.fits
    assert fitted.limits.kind == "generate", "no other engine takes layers that are spread"


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("context", [None, 1024])
def test_exactly_what_fits_is_loaded(
    folder: Path, quantization: str, context: int | None, pretend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = EngineOptions(context_tokens=context)
    model = PlannedModel(spec(folder, quantization), folder)
    before_weights = partial(refuse_too_large, options=options)
    row = context or sizing.ROW_TOKENS
    holding = model.holding(Quantization.parse(quantization), CPU)
    needed = holding.footprint.weights_bytes + sizing.CPU_PARTS * row * holding.token.bytes
    pretend(needed)
    loaded = load(spec(folder, quantization), "cpu", before_weights=before_weights)
    assert loaded.model.get_memory_footprint() <= needed
    # And there is room for that row when it is served.
    pretend(needed - holding.footprint.weights_bytes)
    with closing(ContinuousEngine(loaded, options=options)) as engine:
        assert (engine.limits.context_tokens or 0) >= row
    pretend(needed - 1)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(ModelError, match="it does not fit on cpu: weights"):
        load(spec(folder, quantization), "cpu", before_weights=before_weights)


def refused(of: ModelSpec, options: EngineOptions | None = None) -> str:
    with pytest.raises(Refusal) as caught:
        refuse_too_large(of, Path(of.model), CPU, options or EngineOptions())
    said = str(caught.value)
    assert "\n" not in said
    return said


@pytest.mark.usefixtures("computes_in_bfloat16")
def test_a_refusal_shows_the_sum_and_the_nearest_that_would_fit(folder: Path, pretend: Any) -> None:
    pretend(100 * 1024**2)
    assert refused(spec(folder, "none")) == (
        "it does not fit on cpu: weights 161.9 MiB + cache of one row of 256 tokens 5.6 MiB + for copies and steps "
        "11.2 MiB = 178.8 MiB, and 100.0 MiB are free; what would fit: -q none:dtype=bfloat16 (83.8 MiB), "
        "-q int8 (47.5 MiB), -q nf4:double_quant=false (26.2 MiB)"
    )


def test_what_a_refusal_names_is_loaded(folder: Path, pretend: Any) -> None:
    pretend(100 * 1024**2)
    named = refused(spec(folder, "none")).split("what would fit: ")[1]
    for each in named.split(", "):
        refuse_too_large(spec(folder, each.split()[1]), folder, CPU, EngineOptions())


@pytest.mark.usefixtures("computes_in_bfloat16")
def test_a_context_that_is_too_long_is_refused_with_the_longest_that_fits(folder: Path, pretend: Any) -> None:
    pretend(60 * 1024**2)
    options = EngineOptions(context_tokens=2048)
    assert "cache of one row of 2,048 tokens 22.5 MiB" in refused(spec(folder, "nf4"), options)
    assert "what would fit: --context 1024" in refused(spec(folder, "nf4"), options)
    refuse_too_large(spec(folder, "nf4"), folder, CPU, EngineOptions(context_tokens=1024))
    refused(spec(folder, "nf4"), EngineOptions(context_tokens=1280))


@pytest.mark.usefixtures("computes_in_bfloat16")
def test_a_shorter_context_in_a_less_precise_quantization_is_named_where_nothing_else_fits(
    folder: Path, pretend: Any
) -> None:
    pretend(50 * 1024**2)
    assert "-q nf4:double_quant=false --context 768" in refused(
        spec(folder, "int8"), EngineOptions(context_tokens=2048)
    )


def test_where_nothing_fits_that_is_said(folder: Path, pretend: Any) -> None:
    pretend(1024**2)
    assert refused(spec(folder, "nf4")).endswith("take a smaller model, or a device with more memory")


def test_a_model_that_may_be_offloaded_is_not_refused_by_this_sum(folder: Path, pretend: Any, tmp_path: Path) -> None:
    pretend(150 * 1024**2)
    placement = Placement(("cpu",), offload="disk", offload_folder=tmp_path)
    loaded = load(spec(folder, "none"), "cpu", placement=placement)
    assert loaded.vocabulary > 0


@pytest.fixture(scope="module")
def seven_billion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shape of Llama-2-7B: its configuration alone."""
    folder = tmp_path_factory.mktemp("7b")
    LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, dtype="float16",
        max_position_embeddings=32768,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.mark.usefixtures("computes_in_bfloat16")
@pytest.mark.parametrize(
    ("quantization", "gpu", "context", "said"),
    [
        ("none", 11, None, "-q int8 (7.3 GiB), -q nf4:double_quant=false (4.4 GiB), -q nf4 (4.1 GiB)"),
        ("int8", 6, None, "-q nf4:double_quant=false (4.4 GiB), -q nf4 (4.1 GiB), --devices 0+1 (2 such GPUs)"),
        ("none", 6, 4096, "--offload cpu (10.9 GiB there, and much slower), --device cpu (29.1 GiB), -q nf4"),
        ("none", 24, 32768, "--context 14848, -q nf4:double_quant=false (20.3 GiB), -q nf4 (20.0 GiB)"),
        ("nf4", 3, None, "--devices 0+1 (2 such GPUs), --device cpu (3.7 GiB)"),
    ],
)
def test_a_gpu_that_is_too_small_is_told_what_would_fit(
    seven_billion: Path, quantization: str, gpu: int, context: int | None, said: str, pretend: Any
) -> None:
    pretend(200 * GIB)
    hardware, options = pretended_gpu(gpu * GIB), EngineOptions(context_tokens=context)
    with pytest.raises(Refusal) as caught:
        refuse_beyond(PlannedModel(spec(seven_billion, quantization), seven_billion), hardware, options)
    assert f"what would fit: {said}" in str(caught.value)
    assert "kept free by --gpu-memory-fraction" in str(caught.value)


def test_a_gpu_that_is_large_enough_is_not_refused(seven_billion: Path) -> None:
    model = PlannedModel(spec(seven_billion, "nf4"), seven_billion)
    refuse_beyond(model, pretended_gpu(6 * GIB), EngineOptions())
