"""Planned bytes of models, against those of the loaded ones and against known sizes."""

from __future__ import annotations

import resource
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, PreTrainedConfig

from batchmill.jobs.models.quantization import Quantization
from batchmill.jobs.models.spec import ModelSpec
from batchmill.worker.engine.continuous.support import cache_shape
from batchmill.worker.engine.options import EngineOptions
from batchmill.worker.models.load import load, read_model
from batchmill.worker.plan.hardware import pretended_gpu
from batchmill.worker.plan.model import PlannedModel
from batchmill.worker.plan.report import report
from tests.support.models.families import FAMILIES
from tests.support.models.shapes import shape
from tests.support.models.tiny import build_tokenizer
from tests.tools.bench.models import checkpoint

CPU = torch.device("cpu")
GPU = torch.device("cuda")
GB, GIB = 10**9, 1024**3
QUANTIZATIONS = ("none", "none:dtype=bfloat16", "int8", "nf4", "nf4:double_quant=false", "fp4")
#: Families whose weights are not all in linear layers of their own: tied embeddings, and experts in one tensor.
EXTRA = {
    "tied": lambda: LlamaConfig(**_TINY, tie_word_embeddings=True),
    "experts": lambda: MixtralConfig(**_TINY, num_local_experts=4),
}
_TINY = {
    "vocab_size": 260, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip


def saved(config: PreTrainedConfig, folder: Path) -> Path:
    """A model of random weights, in bfloat16."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def scales_of(model: torch.nn.Module) -> int:
    """The bytes of scales beside quantized weights, which get_memory_footprint() leaves out."""
    found = 0
    for module in model.modules():
        weight = getattr(module, "weight", None)
        state = getattr(weight, "quant_state", None)
        if state is not None:
            nested = [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
            found += sum(each.nbytes for each in [state.absmax, state.code, *nested])
        found += getattr(getattr(weight, "SCB", None), "nbytes", 0)
    return found


def loaded_without_forward(folder: Path, quantization: str) -> Any:
    return read_model(ModelSpec(str(folder), quantization=Quantization.parse(quantization)), folder, CPU)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "mistral", "gemma2", "olmo2", "phi3", *EXTRA])
def test_every_byte_of_a_loaded_model_is_planned(family: str, tmp_path: Path) -> None:
    folder = saved((FAMILIES | EXTRA)[family](), tmp_path)
    model = PlannedModel(ModelSpec(str(folder)), folder)
    for quantization in QUANTIZATIONS:
        held = loaded_without_forward(folder, quantization)
        footprint = model.holding(Quantization.parse(quantization), CPU).footprint
        assert footprint.footprint_bytes == held.get_memory_footprint(), quantization
        assert footprint.scales_bytes == scales_of(held), quantization
        assert model.vocabulary == held.get_input_embeddings().num_embeddings


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_every_byte_of_a_larger_model_is_planned(quantization: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = checkpoint(tmp_path_factory.getbasetemp(), "45m")
    held = loaded_without_forward(folder, quantization)
    footprint = PlannedModel(ModelSpec(str(folder)), folder).holding(Quantization.parse(quantization), CPU).footprint
    assert footprint.footprint_bytes == held.get_memory_footprint()
    assert footprint.scales_bytes == scales_of(held)


@pytest.mark.parametrize("name", ["llama-grouped", "gpt2", "gemma2", "mistral"])
def test_a_tokens_cache_is_what_the_engines_measure(name: str, tmp_path: Path) -> None:
    folder = saved(FAMILIES[name](), tmp_path)
    token = PlannedModel(ModelSpec(str(folder)), folder).holding(Quantization.parse("none"), CPU).token
    loaded = load(ModelSpec(str(folder), quantization=Quantization.parse("none")), "cpu")
    assert (token.bytes, token.continuous) == (cache_shape(loaded).token_bytes, True)
    assert token.window_tokens == {"gemma2": 16, "mistral": 16}.get(name, 0)


def test_a_model_that_the_generate_engine_serves_is_measured_as_that_does(tmp_path: Path) -> None:
    config = FAMILIES["llama"]()
    config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    folder = saved(config, tmp_path)
    token = PlannedModel(ModelSpec(str(folder)), folder).holding(Quantization.parse("none"), CPU).token
    loaded = load(ModelSpec(str(folder), quantization=Quantization.parse("none")), "cpu")
    assert (token.bytes, token.continuous) == (loaded.cache_token_bytes, False)
    assert "longest row" in token.reason


@pytest.mark.parametrize(
    ("name", "quantization", "least", "most"),
    [
        ("7b", "none:dtype=float32", 26.5, 28.5),
        ("7b", "none", 13.2, 14.2),
        ("7b", "int8", 6.6, 7.2),
        ("7b", "nf4", 3.5, 4.0),
        ("70b", "none", 136, 141),
        ("70b", "int8", 68, 71),
        ("70b", "nf4", 34, 37),
    ],
)
def test_known_sizes(name: str, quantization: str, least: float, most: float, tmp_path: Path) -> None:
    footprint = shape(tmp_path, name).holding(Quantization.parse(quantization), GPU).footprint
    assert least <= footprint.weights_bytes / GB <= most


def test_double_quantization_saves_0_37_bit_a_parameter(tmp_path: Path) -> None:
    model = shape(tmp_path, "7b")
    single, double = (
        model.holding(Quantization.parse(each), GPU).footprint for each in ("nf4:double_quant=false", "nf4")
    )
    saved_bits = 8 * (single.weights_bytes - double.weights_bytes) / single.packed_parameters
    assert saved_bits == pytest.approx(0.373, abs=0.001)


def test_seventy_billion_parameters_take_seconds_and_no_memory(tmp_path: Path) -> None:
    model = shape(tmp_path, "70b")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    model.holding(Quantization.parse("nf4"), GPU)
    assert time.process_time() - began < 10, "a second on an idle machine"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024, "kilobytes"


@pytest.mark.parametrize("quantization", ["nf4", "nf4:double_quant=false", "int8"])
def test_a_checkpoint_that_is_quantized_already_is_planned_as_it_is_stored(quantization: str, tmp_path: Path) -> None:
    folder = saved(FAMILIES["llama"](), tmp_path / "plain")
    loaded_without_forward(folder, quantization).save_pretrained(tmp_path / "quantized")
    model = PlannedModel(ModelSpec(str(tmp_path / "quantized")), tmp_path / "quantized")
    held = loaded_without_forward(tmp_path / "quantized", "checkpoint")
    footprint = model.holding(Quantization.parse("checkpoint"), CPU).footprint
    assert footprint.footprint_bytes == pytest.approx(held.get_memory_footprint(), rel=0.02)
    assert footprint.weights_bytes == pytest.approx(held.get_memory_footprint() + scales_of(held), rel=0.02)
    lines = report(model, [pretended_gpu(GIB)], EngineOptions()).devices[0][1]
    assert [str(each.quantization) for each in lines] == ["checkpoint"]


def test_a_checkpoint_that_is_dequantized_while_it_is_loaded_is_planned_so(tmp_path: Path) -> None:
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    model = shape(tmp_path, "7b", quantization_config=fp8)
    found = model.holding(Quantization.parse("checkpoint"), CPU)
    assert found.footprint.weights_bytes == pytest.approx(4 * model.parameters, rel=0.001)
