"""Every quantization loaded for real on a CPU, through the whole line, against transformers alone with the same config.

Six pairs of a row and a shape cover every row's kind and every shape; all pairs are left to `make test-all`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import bitsandbytes.nn.modules
import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from bitsandbytes.nn import Linear4bit
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from batchmill.jobs.errors import ModelError
from batchmill.jobs.models.quantization import Kind, Quantization
from batchmill.jobs.models.spec import ModelSpec
from batchmill.worker.engine.options import EngineChoice, EngineOptions
from batchmill.worker.engine.transformers_kind import serve
from batchmill.worker.models.load import load, loading, read_model
from batchmill.worker.models.quantization.quantization_config import pretrained_arguments
from tests.support.models.checkpoints import SHAPES, save_bitsandbytes, save_shape
from tests.support.models.greedy import ANSWER_TOKENS, PROMPTS, ROUNDED, agree, answers, greedy
from tests.support.models.tiny import build_tokenizer

CPU = torch.device("cpu")
#: The module, whose function has the same name.
PRECISION = import_module("batchmill.worker.models.quantization.quantization_config")
#: In what 4-bit weights are multiplied here where nobody asks for anything.
BEST = torch.bfloat16 if has_avx512bf16() else torch.float32
#: The rows of the table: what transformers alone is asked for. `skip` stands for a layer of each shape.
ROWS: Mapping[str, Mapping[str, Any]] = {
    "nf4": {"dtype": BEST, "bits": 4, "type": "nf4"},
    "nf4:double_quant=false": {"dtype": BEST, "bits": 4, "type": "nf4", "double": False},
    "nf4:compute_dtype=float16": {"dtype": torch.float16, "bits": 4, "type": "nf4"},
    "nf4:compute_dtype=float32": {"dtype": torch.float32, "bits": 4, "type": "nf4"},
    "nf4:skip_modules=skip": {"dtype": BEST, "bits": 4, "type": "nf4", "skip": True},
    "fp4": {"dtype": BEST, "bits": 4, "type": "fp4"},
    "fp4:compute_dtype=float32,double_quant=false": {"dtype": torch.float32, "bits": 4, "type": "fp4", "double": False},
    "int8": {"dtype": torch.float32, "bits": 8},
    "int8:threshold=0": {"dtype": torch.float32, "bits": 8, "threshold": 0.0},
    "int8:skip_modules=skip,threshold=3": {"dtype": torch.float32, "bits": 8, "threshold": 3.0, "skip": True},
    "none": {"dtype": torch.float32},
    "none:dtype=bfloat16": {"dtype": torch.bfloat16},
    "none:dtype=float16": {"dtype": torch.float16},
    "checkpoint": {"dtype": BEST, "bits": 4, "type": "nf4"},
}
#: A name in each shape, and what transformers has to be told for it, beside what it never quantizes.
SKIPPED = {"llama": "q_proj", "qwen": "q_proj", "mistral": "layers.1.mlp", "gpt2": "c_attn"}
TOLD = {**{shape: ["q_proj"] for shape in ("llama", "qwen")}, "mistral": ["model.layers.1.mlp"], "gpt2": ["c_attn"]}
COVERING = (
    ("nf4", "llama"),
    ("fp4:compute_dtype=float32,double_quant=false", "gpt2"),
    ("int8:threshold=0", "qwen"),
    ("none:dtype=bfloat16", "mistral"),
    ("checkpoint", "mistral"),
    ("nf4:skip_modules=skip", "qwen"),
)
PAIRS = [
    pytest.param(*pair, marks=() if pair in COVERING else pytest.mark.slow, id="-".join(reversed(pair)))
    for pair in product(ROWS, SHAPES)
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("shapes")
    return {shape: save_shape(root / shape, shape) for shape in SHAPES}


def spec(folder: Path, quantization: str) -> ModelSpec:
    return ModelSpec(str(folder), quantization=Quantization.parse(quantization))


def written(row: str, shape: str) -> str:
    """The quantization as a user writes it, for this row and this shape."""
    return row.replace("=skip", f"={SKIPPED[shape]}")


def folder_for(row: str, source: Path, root: Path) -> Path:
    """The folder that is loaded: of a checkpoint, one that transformers alone quantized and saved."""
    if row != "checkpoint":
        return source
    return save_bitsandbytes(
        source,
        root / "checkpoint",
        dtype=BEST,
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=BEST,
    )


@contextmanager
def unfused(dtype: torch.dtype) -> Iterator[None]:
    """bitsandbytes as on a CPU without AVX-512 in bfloat16, wherever its fused kernel would ignore this dtype."""
    with pytest.MonkeyPatch.context() as patch:
        if dtype != torch.bfloat16:
            patch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: False)
        yield


def by_transformers(source: Path, row: str, shape: str) -> PreTrainedModel:
    """The model of a plain folder as transformers alone loads it, with the same config; no forward has run."""
    asked = ROWS[row]
    arguments: dict[str, Any] = {"dtype": asked["dtype"], "device_map": {"": "cpu"}}
    skipped = ["lm_head", *TOLD[shape]] if asked.get("skip") else None
    if asked.get("bits") == 4:
        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=asked["type"],
            bnb_4bit_use_double_quant=asked.get("double", True),
            bnb_4bit_compute_dtype=asked["dtype"],
            llm_int8_skip_modules=skipped,
        )
    elif asked.get("bits") == 8:
        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=True, llm_int8_threshold=asked.get("threshold", 6.0), llm_int8_skip_modules=skipped
        )
    with unfused(asked["dtype"]):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(source, **arguments)
    return model


@torch.inference_mode()
def logits(model: PreTrainedModel) -> Tensor:
    found: Tensor = model(input_ids=torch.arange(40)[None] * 3 % 260, use_cache=False).logits
    return found


def tolerance(row: str) -> float:
    """float32 is exact, and so is LLM.int8() without outliers."""
    asked = ROWS[row]
    exact = asked["dtype"] == torch.float32 and asked.get("threshold", 0.0 if asked.get("bits") != 8 else 6.0) == 0.0
    return 0.0 if exact else ROUNDED


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("row", ROWS)
def test_footprint_and_logits_are_those_of_transformers_with_the_same_config(
    folders: dict[str, Path], tmp_path: Path, row: str, shape: str
) -> None:
    of = spec(folder_for(row, folders[shape], tmp_path), written(row, shape))
    with loading(of):
        model = read_model(of, Path(of.model), CPU)
    expected = by_transformers(folders[shape], row, shape)
    assert model.get_memory_footprint() == expected.get_memory_footprint()
    assert {type(each).__name__ for each in model.modules()} == {type(each).__name__ for each in expected.modules()}
    assert torch.equal(logits(model), logits(expected))


@pytest.mark.parametrize(("row", "shape"), PAIRS)
def test_both_engines_say_what_generate_says_of_the_same_model(
    folders: dict[str, Path], tmp_path: Path, row: str, shape: str
) -> None:
    of = spec(folder_for(row, folders[shape], tmp_path), written(row, shape))
    expected = greedy(load(of, "cpu").model, tolerance=tolerance(row))
    for kind in (EngineChoice.AUTO, EngineChoice.GENERATE):
        options = EngineOptions(kind=kind, max_rows=4)
        engine = serve(load(of, "cpu"), options=options)
        assert engine.limits.kind == ("continuous" if kind is EngineChoice.AUTO else "generate")
        assert agree(answers(engine), expected)


@pytest.mark.parametrize(("row", "shape"), PAIRS)
def test_every_row_goes_through_the_whole_line(folders: dict[str, Path], tmp_path: Path, row: str, shape: str) -> None:
    folder, out = folder_for(row, folders[shape], tmp_path), tmp_path / "out.jsonl"
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    words = ["run", file, "-m", folder, "-q", written(row, shape), "--device", "cpu", "-o", out]
    words += ["--temperature", "0", "--max-tokens", ANSWER_TOKENS]
    done = subprocess.run(
        [sys.executable, "-m", "batchmill", *map(str, words)],
        capture_output=True,
        text=True,
        env=os.environ,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    expected = greedy(by_transformers(folders[shape], row, shape), tolerance=tolerance(row))
    assert agree([line["text"] for line in lines], expected)


def test_the_covering_pairs_have_every_kind_and_every_shape() -> None:
    kinds = {Quantization.parse(row).kind for row, _ in COVERING}
    assert kinds == set(Kind)
    assert {shape for _, shape in COVERING} == set(SHAPES)


def refusal(of: ModelSpec) -> str:
    with pytest.raises(ModelError) as caught:
        load(of, "cpu")
    return str(caught.value).removeprefix(f"cannot load {of}: ")


@pytest.mark.parametrize("quantization", ["nf4:skip_modules=nothing", "int8:skip_modules=q_proj+nothing"])
def test_a_module_that_the_model_has_not_is_refused_by_name(folders: dict[str, Path], quantization: str) -> None:
    said = refusal(spec(folders["llama"], quantization))
    assert said.startswith("skip_modules=nothing: the model has no such linear layer; it has q_proj, k_proj, v_proj, ")


@pytest.mark.parametrize("name", ["proj", "self_attn.q", "layers.2", "0.mlp.up", "embed_tokens"])
def test_a_part_of_a_name_names_no_module(folders: dict[str, Path], name: str) -> None:
    assert f"skip_modules={name}:" in refusal(ModelSpec(str(folders["llama"]), None, skipping(name)))


def skipping(name: str) -> Quantization:
    """Also for names that nobody could write with -q."""
    quantization = Quantization.parse("nf4:skip_modules=x")
    object.__setattr__(quantization, "_written", (("skip_modules", (name,)),))
    return quantization


def test_heads_are_never_quantized_whatever_is_skipped_besides(folders: dict[str, Path]) -> None:
    for shape in SHAPES:
        model = load(spec(folders[shape], f"nf4:skip_modules={SKIPPED[shape]}"), "cpu").model
        assert not isinstance(model.lm_head, Linear4bit), "transformers forgets it once it is given a list"


def test_layers_on_the_cpu_beside_a_gpu_are_no_option_of_a_cpu_alone(folders: dict[str, Path]) -> None:
    said = refusal(spec(folders["llama"], "int8:fp32_cpu_offload=true"))
    assert said.startswith("-q int8:fp32_cpu_offload=true is about layers on the CPU beside others on a GPU")


@pytest.mark.parametrize("quantization", ["nf4", "nf4:compute_dtype=float32"])
def test_sizes_that_the_fused_kernel_does_not_take_are_served_without_it(tmp_path: Path, quantization: str) -> None:
    """bitsandbytes itself ends with an AssertionError at outputs that are no multiple of 32, on CPUs that have it."""
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, vocab_size=260, max_position_embeddings=128, bos_token_id=0, eos_token_id=1)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    loaded = load(spec(tmp_path, quantization), "cpu")
    fused = [
        getattr(each.weight.quant_state, "packing_format_for_cpu", False)
        for each in loaded.model.modules()
        if isinstance(each, Linear4bit)
    ]
    assert len(fused) == 7
    assert not any(fused)


class _Gpu:
    """The questions to a device here: a GPU of some age, which no CPU can stand in for."""

    type = "cuda"


@pytest.mark.parametrize(
    ("quantization", "has_bfloat16", "dtype"),
    [
        ("nf4", True, torch.bfloat16),
        ("nf4", False, torch.float16),
        ("nf4:compute_dtype=float16", True, torch.float16),
        ("nf4:compute_dtype=float32", False, torch.float32),
        ("int8", True, torch.bfloat16),
        ("int8", False, torch.float16),
        ("none", True, "auto"),
        ("none", False, torch.float16),
        ("none:dtype=float32", False, torch.float32),
        ("none:dtype=bfloat16", True, torch.bfloat16),
    ],
)
def test_a_gpu_gets_the_dtype_that_it_can_compute_in(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, quantization: str, has_bfloat16: bool, dtype: Any
) -> None:
    monkeypatch.setattr(PRECISION, "_has_bfloat16", lambda device: has_bfloat16)
    config = AutoConfig.from_pretrained(folders["llama"])
    config.dtype = torch.bfloat16
    asked = pretrained_arguments(spec(folders["llama"], quantization), config, folders["llama"], _Gpu())  # type: ignore[arg-type]
    assert asked["dtype"] == dtype
    if "nf4" in quantization:
        assert asked["quantization_config"].bnb_4bit_compute_dtype == dtype


def test_bfloat16_is_refused_by_a_gpu_without_it(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PRECISION, "_has_bfloat16", lambda device: False)
    config = AutoConfig.from_pretrained(folders["llama"])
    with pytest.raises(Exception, match="this GPU has no bfloat16; use -q none:dtype=float16"):
        pretrained_arguments(spec(folders["llama"], "none:dtype=bfloat16"), config, folders["llama"], _Gpu())  # type: ignore[arg-type]
