"""Hostile and broken model folders: each is refused before anything of it is loaded, with what and why."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from batchmill.jobs.errors import ModelError
from batchmill.jobs.models.quantization import Kind, Quantization
from batchmill.jobs.models.spec import DEMO_FOLDER, ModelSpec
from batchmill.jobs.requests.generation import GenerationRequest
from batchmill.jobs.requests.request import ErrorCode, RequestKey
from batchmill.worker.engine.generate.engine import GenerateEngine
from batchmill.worker.engine.options import EngineOptions
from batchmill.worker.models.load import load
from batchmill.worker.models.vetting import Refusal, vet, weights
from tests.support.models.tiny import save_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def folder(model: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(model, tmp_path / "folder"))


def refusal(folder: Path) -> str:
    with pytest.raises(Refusal) as caught:
        vet(folder)
    said = str(caught.value)
    assert "\n" not in said
    assert len(said) < 500
    return said


def rewrite(file: Path, **changes: Any) -> None:
    """Changes keys of a JSON file, or makes one."""
    values = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(values | changes))


def sharded(folder: Path, **mapping: Any) -> None:
    """Makes the weights one shard, with an index that says so unless told otherwise."""
    shard = "model-00001-of-00001.safetensors"
    (folder / "model.safetensors").rename(folder / shard)
    index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": shard} | mapping}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_good_folders_pass(folder: Path) -> None:
    vet(folder)
    vet(DEMO_FOLDER)
    (folder / "pytorch_model.bin").write_bytes(b"a pickle beside safetensors is never read")
    (folder / "own.py").write_text("raise SystemExit")
    (folder / "original").mkdir()
    rewrite(folder / "added_tokens.json", auto_map=9)
    sharded(folder)
    vet(folder)
    assert [file.name for file in weights(folder)] == ["model-00001-of-00001.safetensors"]


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer_config.json", "generation_config.json", "processor_config.json"]
)
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"text_config": [{"deep": {"auto_map": None}}]}, "has auto_map"),
        ({"custom_pipelines": {}}, "has custom_pipelines"),
        ({"keypoint_detector_config": {"trust_remote_code": True}}, "has trust_remote_code"),
        ({"_attn_implementation": "org/kernel"}, "has _attn_implementation: it can name code to fetch and run"),
        ({"_attn_implementation_internal": "org/kernel"}, "has _attn_implementation_internal"),
        ({"_attn_implementation": {"text_config": "sdpa", "": "org/kernel"}}, "has _attn_implementation"),
        ({"_attn_implementation": ["sdpa"]}, "has _attn_implementation"),
        ({"_experts_implementation": True}, "has _experts_implementation"),
        ({"text_config": {"attn_implementation": "org/kernel"}}, "has attn_implementation"),
        ({"_experts_implementation": "org/kernel"}, "has _experts_implementation"),
        ({"transformers_weights": "../other.safetensors"}, "has transformers_weights"),
    ],
)
def test_a_configuration_that_names_code_or_other_files_is_refused(
    folder: Path, name: str, changes: dict[str, Any], reason: str
) -> None:
    rewrite(folder / name, **changes)
    assert f"its {name} {reason}" in refusal(folder)


OWN_CODE = """
import pathlib
pathlib.Path(__file__).with_name("it-ran").touch()
raise SystemExit
"""


@pytest.fixture
def with_own_code(folder: Path) -> Path:
    """A folder as Phi-3-mini's: classes of its own in files beside the weights, of a model that transformers knows."""
    for name in ("configuration_own", "modeling_own", "tokenization_own", "processing_own"):
        (folder / f"{name}.py").write_text(OWN_CODE)
    classes = {"AutoConfig": "configuration_own.Own", "AutoModelForCausalLM": "modeling_own.Own"}
    rewrite(folder / "config.json", auto_map=classes)
    rewrite(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "tokenization_own.Own"]})
    rewrite(folder / "processor_config.json", auto_map={"AutoProcessor": "processing_own.Own"})
    return folder


def test_a_model_that_transformers_knows_is_served_by_its_class_and_no_other(with_own_code: Path) -> None:
    before = {file: file.read_bytes() for file in with_own_code.iterdir()}
    loaded = load(ModelSpec(str(with_own_code), quantization=Quantization(Kind.NONE)), "cpu")
    assert type(loaded.model).__module__ == "transformers.models.llama.modeling_llama"
    assert type(loaded.tokenizer).__module__.startswith("transformers.")
    assert not hasattr(loaded.model.config, "auto_map")
    assert {file: file.read_bytes() for file in with_own_code.iterdir()} == before, (
        "something of it ran, or was written"
    )


@pytest.mark.parametrize("known", [None, "own_model", ["llama"]])
def test_code_of_a_model_that_transformers_does_not_know_is_refused(with_own_code: Path, known: Any) -> None:
    rewrite(with_own_code / "config.json", model_type=known)
    assert "its config.json has auto_map: it asks for code of its own, which is never run" in refusal(with_own_code)
    assert not (with_own_code / "it-ran").exists()


def test_a_tokenizer_of_its_own_is_refused_also_beside_a_known_model(with_own_code: Path) -> None:
    rewrite(with_own_code / "tokenizer_config.json", tokenizer_class="OwnTokenizer")
    (with_own_code / "tokenizer.json").unlink()
    with pytest.raises(ModelError):
        load(ModelSpec(str(with_own_code), quantization=Quantization(Kind.NONE)), "cpu")
    assert not (with_own_code / "it-ran").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"_attn_implementation_autoset": True},
        {"_attn_implementation": None},
        {"_attn_implementation": "flash_attention_2"},
        {"attn_implementation": "eager"},
        {"_attn_implementation_internal": "flash_attention_3"},
    ],
)
def test_what_names_attention_of_transformers_itself_names_no_code(folder: Path, changes: dict[str, Any]) -> None:
    rewrite(folder / "config.json", **changes)
    loaded = load(ModelSpec(str(folder), quantization=Quantization(Kind.NONE)), "cpu")
    assert loaded.model.config._attn_implementation == "sdpa"


def test_shards_without_their_index_are_told_by_its_name(folder: Path) -> None:
    for number in (1, 2):
        (folder / f"model-0000{number}-of-00002.safetensors").touch()
    (folder / "model.safetensors").unlink()
    assert "lacks model.safetensors.index.json, which says what each of its 2 files of weights holds" in refusal(folder)


def test_a_folder_with_pickled_weights_only_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    (folder / "other.safetensors").touch()
    assert "holds no safetensors weights, and others are not loaded, since a pickle can run code" in refusal(folder)


def test_an_adapter_which_names_another_model_is_refused(folder: Path) -> None:
    rewrite(folder / "adapter_config.json", base_model_name_or_path="other-org/other-model")
    assert "an adapter names another model to load" in refusal(folder)


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors",
        "/etc/secret.safetensors",
        "a/b.safetensors",
        "..\\x.safetensors",
        "weights.bin",
        "..",
        "",
    ],
)
def test_shard_names_that_leave_the_folder_are_refused(folder: Path, name: str) -> None:
    sharded(folder, other=name)
    assert "not a safetensors file beside it; files elsewhere are never read" in refusal(folder)


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_an_index_without_names_is_refused(folder: Path, content: str) -> None:
    sharded(folder)
    (folder / "model.safetensors.index.json").write_text(content)
    assert "has no weight_map" in refusal(folder)


def test_a_missing_shard_is_named(folder: Path) -> None:
    sharded(folder, other="model-00002-of-00002.safetensors")
    assert "lacks model-00002-of-00002.safetensors" in refusal(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"])
def test_links_out_of_the_folder_are_refused(folder: Path, tmp_path: Path, name: str) -> None:
    file = folder / name
    elsewhere = tmp_path / "elsewhere"
    file.rename(elsewhere) if file.exists() else elsewhere.touch()
    file.symlink_to(elsewhere)
    assert f"{name} is a link that leaves the folder" in refusal(folder)


def test_links_within_the_folder_and_to_it_pass(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").rename(folder / "weights")
    (folder / "model.safetensors").symlink_to("weights")
    (tmp_path / "link").symlink_to(folder)
    vet(tmp_path / "link")


def header(content: Any, *, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file; `length` is what it says of its header."""
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


TENSOR = {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not a safetensors file"),
        (b"\0" * 100, "not a safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "not a safetensors file"),
        (header(TENSOR, length=2**63), "not a safetensors file"),
        (header(TENSOR, length=1_000), "not a safetensors file"),
        (header(b"garbage"), "no safetensors header"),
        (header(b"[" * 50_000), "no safetensors header"),
        (header([]), "no safetensors header"),
        (header({"x": 5}), "no safetensors header"),
        (header({"x": {"data_offsets": ["a", "b"]}}), "no safetensors header"),
        (header(TENSOR, data=b"1234567"), "and its safetensors header tells of"),
        (header(TENSOR, data=b"123456789"), "and its safetensors header tells of"),
    ],
)
def test_a_garbage_or_truncated_file_is_refused(folder: Path, content: bytes, reason: str) -> None:
    (folder / "model.safetensors").write_bytes(content)
    assert reason in refusal(folder)


def test_a_download_that_was_cut_off_is_refused(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 1)
    assert "copy or fetch it again" in refusal(folder)


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[" * 100_000])
def test_a_configuration_that_is_not_json_is_refused(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    assert "config.json is not JSON" in refusal(folder)


def test_an_endless_configuration_is_not_read(folder: Path) -> None:
    os.truncate(folder / "config.json", 2**40)
    assert "more than 32 MiB" in refusal(folder)


HOSTILE_TEMPLATES: dict[str, Callable[[Path], str]] = {
    "globals": lambda proof: "{{ cycler.__init__.__globals__.os.mkdir('" + str(proof) + "') }}",
    "subclasses": lambda _: "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "format": lambda _: "{{ '{0.__class__.__init__.__globals__}'.format(messages.append) }}",
    "change": lambda _: "{{ messages.append({}) }}",
    "range": lambda _: "{% for i in range(10**12) %}{% endfor %}",
}


@pytest.mark.parametrize("name", HOSTILE_TEMPLATES)
def test_a_hostile_chat_template_runs_in_a_sandbox(folder: Path, tmp_path: Path, name: str) -> None:
    proof = tmp_path / "proof"
    (folder / "chat_template.jinja").write_text(HOSTILE_TEMPLATES[name](proof))
    engine = GenerateEngine(
        load(ModelSpec(str(folder), quantization=Quantization(Kind.NONE)), "cpu"), options=EngineOptions(max_rows=1)
    )
    engine.add(RequestKey("job", 0), GenerationRequest(0, "0", messages=({"role": "user", "content": "{{ 7 * 7 }}"},)))
    (output,) = engine.step()
    assert output.error is not None
    assert output.error.code == ErrorCode.CHAT_TEMPLATE_ERROR
    assert not proof.exists()
