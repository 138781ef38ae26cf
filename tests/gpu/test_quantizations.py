"""1 B and 8 B shapes of random weights in every quantization on a CUDA device: seconds, weights and peaks, in a table.

Also what no CPU can run: FP8 products of compressed-tensors.
"""

from __future__ import annotations

import gc
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from batchmill.jobs.models.quantization import Quantization
from batchmill.jobs.models.spec import ModelSpec
from batchmill.worker.engine.options import EngineOptions
from batchmill.worker.engine.transformers_kind import serve
from batchmill.worker.models.load import load
from batchmill.worker.models.quantization.quantized_copy import save_quantized
from tests.support.models.checkpoints import save_compressed, save_shape
from tests.support.models.greedy import ROUNDED, agree, answers, greedy
from tests.support.models.tiny import build_tokenizer

GIB = 2**30
QUANTIZATIONS = (
    "nf4",
    "nf4:double_quant=false",
    "nf4:compute_dtype=float16",
    "nf4:compute_dtype=float32",
    "fp4",
    "int8",
    "int8:threshold=0",
    "none",
    "none:dtype=float16",
)


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama; `gib`: its weights in bfloat16."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int
    gib: float


SHAPES = {
    "1b": Shape(2048, 5632, 20, 32, 32_000, 1.9),
    "8b": Shape(4096, 14_336, 32, 32, 128_256, 15.0),
}
#: Of the bytes in bfloat16, at least and at most; heads and embeddings stay as they are.
SHARES = {"nf4": (0.25, 0.55), "fp4": (0.25, 0.55), "int8": (0.5, 0.75), "none": (0.95, 1.1)}


@pytest.fixture(scope="module", params=SHAPES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Random weights in bfloat16, made on the device."""
    shape = SHAPES[request.param]
    if torch.cuda.get_device_properties(0).total_memory < 1.3 * shape.gib * GIB:
        pytest.skip("the device is too small")
    folder = tmp_path_factory.mktemp(request.param)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=8,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    del model
    _collect()
    return request.param, folder


def _collect() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def spec(folder: Path, quantization: str) -> ModelSpec:
    return ModelSpec(str(folder), quantization=Quantization.parse(quantization))


@pytest.mark.timeout(900)
def test_every_quantization_in_a_table(folder: tuple[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    name, path = folder
    lines = [
        f"| {name} | load seconds | weights GiB | peak allocated GiB | peak reserved GiB |",
        "|---|---|---|---|---|",
    ]
    for quantization in QUANTIZATIONS:
        _collect()
        loaded = load(spec(path, quantization), "cuda:0")
        peaks = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        shown = (loaded.load_seconds, *(each / GIB for each in (loaded.weights_bytes, *peaks)))
        lines.append(f"| {quantization} | " + " | ".join(f"{each:.2f}" for each in shown) + " |")
        least, most = SHARES[loaded.spec.quantization.kind]
        most *= 2 if "float32" in quantization else 1  # embeddings and head in float32
        assert least < loaded.weights_bytes / GIB / SHAPES[name].gib < most
        del loaded
    with capsys.disabled():
        sys.stdout.write("\n" + "\n".join(lines) + "\n")


@pytest.mark.timeout(900)
def test_a_quantized_copy_loads_without_quantizing_again_and_says_the_same(
    folder: tuple[str, Path], tmp_path: Path
) -> None:
    _, path = folder
    saved = save_quantized(spec(path, "nf4"), tmp_path / "out", "cuda:0")
    ids = torch.arange(40, device="cuda")[None]
    found = []
    for of in (spec(path, "nf4"), spec(tmp_path / "out", "checkpoint")):
        _collect()
        loaded = load(of, "cuda:0")
        with torch.inference_mode():
            found.append(loaded.model(input_ids=ids, use_cache=False).logits.cpu())
        assert saved.weights_bytes < 1.2 * loaded.weights_bytes
        del loaded
    assert torch.equal(*found)


@pytest.mark.parametrize("shape", ["llama", "qwen", "mistral"])
@pytest.mark.parametrize("form", ["pack-quantized", "int-quantized", "float-quantized"])
def test_compressed_tensors_answer_on_the_device(tmp_path: Path, shape: str, form: str) -> None:
    save_compressed(save_shape(tmp_path / "plain", shape), tmp_path / "out", {"_proj": form})
    loaded = load(spec(tmp_path / "out", "checkpoint"), "cuda:0")
    held = {each.weight.dtype for each in loaded.model.modules() if isinstance(each, torch.nn.Linear)}
    in_fp8 = form == "float-quantized" and torch.cuda.get_device_capability() >= (8, 9)
    assert (torch.float8_e4m3fn in held) == in_fp8
    expected = greedy(loaded.model, tolerance=ROUNDED)
    engine = serve(loaded, options=EngineOptions(max_rows=4))
    assert agree(answers(engine), expected)
