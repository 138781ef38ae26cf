"""`-q checkpoint`: what model folders are quantized with is recognised, runs where it can, and says what lacks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, MutableMapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Int8Params, Params4bit
from safetensors.torch import load_file, save_file
from structlog.testing import capture_logs
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from batchmill.jobs import VERSION
from batchmill.jobs.errors import ModelError, UsageError
from batchmill.jobs.models.quantization import Quantization
from batchmill.jobs.models.spec import ModelSpec
from batchmill.worker.engine.options import EngineOptions
from batchmill.worker.engine.transformers_kind import serve
from batchmill.worker.models.load import LoadedModel, load
from batchmill.worker.models.quantization import checkpoint, layers
from batchmill.worker.models.quantization.checkpoint import Checkpoint
from batchmill.worker.models.quantization.quantized_copy import save_quantized
from batchmill.worker.models.vetting import Refusal
from tests.support.models.checkpoints import save_bitsandbytes, save_compressed, save_fp8, save_shape, say
from tests.support.models.greedy import ROUNDED, agree, answers, greedy

CPU = torch.device("cpu")
#: Formats of compressed-tensors, for layers whose names end so.
COMPRESSED = {
    "int4": {"_proj": "pack-quantized"},
    "int8": {"_proj": "int-quantized"},
    "fp8": {"_proj": "float-quantized"},
    "mixed": {"self_attn.*_proj": "float-quantized", "mlp.*_proj": "pack-quantized"},
}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("shapes")
    return {shape: save_shape(root / shape, shape) for shape in ("llama", "qwen", "gpt2")}


@pytest.fixture
def folder(shapes: dict[str, Path], tmp_path: Path) -> Path:
    """A copy to write into."""
    return Path(shutil.copytree(shapes["llama"], tmp_path / "copy"))


@pytest.fixture
def said() -> Iterator[list[MutableMapping[str, Any]]]:
    with capture_logs() as lines:
        yield lines


def spec(folder: Path, quantization: str = "checkpoint") -> ModelSpec:
    return ModelSpec(str(folder), quantization=Quantization.parse(quantization))


@torch.inference_mode()
def logits(model: PreTrainedModel) -> Tensor:
    found: Tensor = model(input_ids=torch.arange(40)[None] * 3 % 260, use_cache=False).logits
    return found


def meaning(folder: Path, weights: dict[str, Tensor]) -> PreTrainedModel:
    """The model of a folder with some of its weights replaced by what their quantized ones stand for."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert not model.load_state_dict(weights, strict=False).unexpected_keys
    return model


def agrees_with_generate(loaded: LoadedModel, *, tolerance: float = 0.0) -> None:
    """The continuous engine says, greedily and all at once, what transformers' generate says of each prompt alone."""
    expected = greedy(loaded.model, tolerance=tolerance)
    engine = serve(loaded, options=EngineOptions(max_rows=4))
    assert engine.limits.kind == "continuous"
    assert agree(answers(engine), expected)


@pytest.mark.parametrize("shape", ["llama", "qwen"])
@pytest.mark.parametrize("groups", COMPRESSED.values(), ids=COMPRESSED)
def test_compressed_tensors_run_dequantized_which_the_log_says(
    shapes: dict[str, Path], tmp_path: Path, shape: str, groups: dict[str, str], said: list[MutableMapping[str, Any]]
) -> None:
    meant = save_compressed(shapes[shape], tmp_path / "out", groups)
    loaded = load(spec(tmp_path / "out"), "cpu")
    expected = meaning(shapes[shape], meant)
    assert torch.equal(logits(loaded.model), logits(expected))
    assert [line["method"] for line in said if "dequantized" in line["event"]] == ["compressed-tensors"]
    agrees_with_generate(loaded)


@pytest.mark.parametrize("shape", ["llama", "qwen"])
def test_fp8_runs_dequantized_which_the_log_says(
    shapes: dict[str, Path], tmp_path: Path, shape: str, said: list[MutableMapping[str, Any]]
) -> None:
    meant = save_fp8(shapes[shape], tmp_path / "out")
    loaded = load(spec(tmp_path / "out"), "cpu")
    expected = meaning(shapes[shape], meant)
    assert torch.equal(logits(loaded.model), logits(expected))
    assert loaded.model.get_memory_footprint() == expected.get_memory_footprint()
    assert [line["because"] for line in said if "dequantized" in line["event"]] == [
        "its kernels are code fetched from the Hub, which is never run"
    ]
    agrees_with_generate(loaded)


def test_fp8_blocks_that_an_edge_cuts_are_refused_instead_of_read_wrongly(
    shapes: dict[str, Path], tmp_path: Path
) -> None:
    save_fp8(shapes["llama"], tmp_path / "out", block=48)
    with pytest.raises(ModelError, match=r"_proj of \d+ x \d+ is no whole number of blocks of 48 x 48"):
        load(spec(tmp_path / "out"), "cpu")


@pytest.mark.parametrize("shape", ["llama", "qwen", "gpt2"])
@pytest.mark.parametrize(
    "asked",
    [
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
        {"load_in_8bit": True, "llm_int8_threshold": 3.0},
    ],
    ids=["nf4", "fp4", "int8"],
)
def test_weights_that_bitsandbytes_quantized_are_served_as_they_are(
    shapes: dict[str, Path], tmp_path: Path, shape: str, asked: dict[str, Any]
) -> None:
    folder = save_bitsandbytes(shapes[shape], tmp_path / "out", **asked)
    loaded = load(spec(folder), "cpu")
    held = loaded.model.config.quantization_config
    assert held.llm_int8_threshold == asked.get("llm_int8_threshold", 6.0)
    plain = {each.dtype for each in loaded.model.parameters() if each.is_floating_point()}
    assert len(plain) == 1, "transformers leaves embeddings as they were stored, and casts biases"
    agrees_with_generate(loaded, tolerance=ROUNDED)


@pytest.mark.parametrize("shape", ["llama", "qwen", "gpt2"])
@pytest.mark.parametrize(
    "quantization", ["nf4", "nf4:compute_dtype=float32", "fp4:double_quant=false", "int8:threshold=3"]
)
def test_a_quantized_copy_loads_without_quantizing_again_and_says_the_same(
    shapes: dict[str, Path], tmp_path: Path, shape: str, quantization: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "deep" / "out"
    saved = save_quantized(spec(shapes[shape], quantization), out, "cpu")
    assert saved.weights_bytes == sum(each.stat().st_size for each in out.glob("*.safetensors"))
    assert saved.weights_bytes < sum(each.stat().st_size for each in shapes[shape].glob("*.safetensors")) / 2
    assert saved.seconds > 0
    original = load(spec(shapes[shape], quantization), "cpu").model

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("quantized again")

    for parameter in (Params4bit, Int8Params):
        monkeypatch.setattr(parameter, "_quantize", fail)
    copy = load(spec(out), "cpu").model
    assert torch.equal(logits(copy), logits(original))
    assert copy.get_memory_footprint() == original.get_memory_footprint()


def test_a_quantized_copy_has_everything_beside_its_weights_and_no_path_in_it(folder: Path, tmp_path: Path) -> None:
    (folder / "generation_config.json").write_text('{"temperature": 0.3, "do_sample": false}')
    (folder / "notes.md").write_text("not needed")
    save_quantized(spec(folder, "nf4:skip_modules=q_proj"), tmp_path / "out", "cpu")
    names = {each.name for each in (tmp_path / "out").iterdir()}
    assert names == {
        *("chat_template.jinja", "config.json", "generation_config.json"),
        *("model.safetensors", "tokenizer.json", "tokenizer_config.json", "batchmill.json"),
    }
    for name in names - {"config.json", "model.safetensors", "batchmill.json"}:
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    assert str(tmp_path) not in (tmp_path / "out" / "config.json").read_text()
    assert load(spec(tmp_path / "out"), "cpu").defaults.temperature == 0.0  # greedy, as do_sample false says


def test_a_quantized_copy_names_its_form_and_one_of_a_newer_form_is_refused(folder: Path, tmp_path: Path) -> None:
    save_quantized(spec(folder, "nf4"), tmp_path / "out", "cpu")
    file = tmp_path / "out" / "batchmill.json"
    assert json.loads(file.read_text()) == {"format": 1, "batchmill": VERSION}
    file.write_text('{"format": 2}')
    with pytest.raises(ModelError, match="a form that this batchmill does not know; use the newer batchmill"):
        load(spec(tmp_path / "out"), "cpu")
    file.unlink()  # as copies of before it was said
    load(spec(tmp_path / "out"), "cpu")


@pytest.mark.parametrize(
    ("quantization", "what"), [("none", "-q none quantizes nothing"), ("checkpoint", "quantizes nothing")]
)
def test_what_cannot_be_saved_is_refused(folder: Path, tmp_path: Path, quantization: str, what: str) -> None:
    with pytest.raises(UsageError, match=what):
        save_quantized(spec(folder, quantization), tmp_path / "out", "cpu")
    with pytest.raises(UsageError, match="not an empty folder"):
        save_quantized(spec(folder, "nf4"), folder, "cpu")
    with pytest.raises(UsageError, match="echo holds no weights"):
        save_quantized(ModelSpec("echo"), tmp_path / "out", "cpu")
    assert not (tmp_path / "out").exists()


def test_a_copy_that_fails_leaves_nothing_behind(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(ModelError, match=r"cannot save a copy in .*out: No space left on device"):
        save_quantized(spec(folder, "nf4"), tmp_path / "out", "cpu")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["copy"]


def refusal(folder: Path, quantization: str = "checkpoint") -> str:
    with pytest.raises(ModelError) as caught:
        load(spec(folder, quantization), "cpu")
    said = str(caught.value)
    assert said.startswith(f"cannot load {spec(folder, quantization)}: ")
    assert "\n" not in said
    return said


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8", "none", "none:dtype=bfloat16"])
def test_what_is_quantized_already_is_refused_by_every_other_kind(folder: Path, quantization: str) -> None:
    say(folder, quant_method="gptq", bits=4)
    assert "quantized already (gptq); take it as it is with -q checkpoint" in refusal(folder, quantization)


def test_what_is_not_quantized_is_refused_by_checkpoint(folder: Path) -> None:
    assert "says of no quantization; choose -q nf4, fp4, int8 or none" in refusal(folder)


@pytest.mark.parametrize(
    ("method", "modules", "command"),
    [
        ("compressed-tensors", "compressed_tensors", "pip install 'batchmill[compressed-tensors]'"),
        ("torchao", "torchao", "pip install 'torchao'"),
    ],
)
def test_a_missing_library_is_named_with_the_command_that_installs_it(
    folder: Path, method: str, modules: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "find_spec", lambda name: None if name == modules else find_spec("json"))
    say(folder, quant_method=method, bits=4)
    said = refusal(folder)
    assert f"quantized by {method}, and of its libraries {modules} cannot be found; " in said
    assert said.endswith(f"run: {command}")


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_missing_library_that_no_extra_brings_is_said_to_be_none(
    folder: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "find_spec", lambda name: None if name == "gptqmodel" else find_spec("json"))
    say(folder, quant_method=method, bits=4)
    said = refusal(folder)
    assert f"quantized by {method}, and of its libraries gptqmodel cannot be found; batchmill has no extra" in said
    assert said.endswith("take the original with -q nf4")
    assert "pip install" not in said


def test_a_part_of_a_package_that_is_missing_is_missing(folder: Path) -> None:
    say(folder, quant_method="quanto")
    if find_spec("optimum") is None:
        assert "optimum.quanto cannot be found; run: pip install 'optimum-quanto'" in refusal(folder)


@pytest.mark.parametrize("method", ["fbgemm_fp8", "hqq", "spqr", "vptq"])
def test_what_a_cpu_cannot_run_is_refused_before_loading(folder: Path, method: str) -> None:
    say(folder, quant_method=method)
    assert f"quantized by {method}, which runs on a GPU alone" in refusal(folder)


@pytest.mark.parametrize("method", ["quark", "nvfp4", "eetq", "unheard-of"])
def test_what_is_not_loaded_is_refused_by_name(folder: Path, method: str) -> None:
    say(folder, quant_method=method)
    said = refusal(folder)
    assert f"quantized by '{method}', and that is not loaded" in said
    assert "loaded are bitsandbytes_4bit, bitsandbytes_8bit, gptq, awq, compressed-tensors, fp8" in said


def test_every_method_that_transformers_lists_is_known() -> None:
    assert set(checkpoint._METHODS) | set(checkpoint.REFUSED) == set(AUTO_QUANTIZATION_CONFIG_MAPPING)


def test_weights_in_the_order_of_their_activations_are_refused(folder: Path) -> None:
    weights = {"num_bits": 4, "type": "int", "actorder": "group"}
    say(folder, quant_method="compressed-tensors", config_groups={"group_0": {"weights": weights}})
    assert "in the order of their activations (actorder: group)" in refusal(folder)


def test_a_text_models_quantization_counts_for_the_whole() -> None:
    class Config:
        def get_text_config(self, decoder: bool) -> Any:
            text = Config()
            text.quantization_config = {"quant_method": "awq"}  # type: ignore[attr-defined]
            return text

    found = Checkpoint.of(Config())
    assert found is not None
    assert found.method == "awq"


def test_weights_that_are_missing_are_named_and_never_random(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"], tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "lack 2 of its weights, such as model.layers.1.mlp.down_proj.weight" in refusal(folder, "none")


def test_a_bitsandbytes_that_ignores_compute_dtype_is_found_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load(spec(folder, "nf4:compute_dtype=float32"), "cpu").model
    for layer in layers._unfused(loaded):
        layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(Refusal, match=r"multiplies 4-bit weights in bfloat16 on this CPU, not in torch.float32"):
        layers.refuse_ignored(loaded)


@pytest.mark.skipif(find_spec("gptqmodel") is None, reason="gptqmodel is not installed")
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_checkpoints_of_gptqmodel_load_where_it_is_installed(folder: Path, tmp_path: Path, method: str) -> None:
    from gptqmodel import GPTQModel, QuantizeConfig

    config = QuantizeConfig(bits=4, group_size=32, quant_method=method, format="gemm" if method == "awq" else "gptq")
    model = GPTQModel.load(str(folder), config)
    model.quantize(["one two three four five six seven eight"] * 32)
    model.save(str(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["quant_method"] == method
    agrees_with_generate(load(spec(tmp_path / "out"), "cpu"), tolerance=ROUNDED)
