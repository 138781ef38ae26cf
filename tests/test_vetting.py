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

from jobs.quantization import Kind, Quantization
from jobs.schema import ErrorCode, Request, RequestKey
from jobs.spec import ModelSpec
from tests.tiny import save_tiny_model
from worker.engine.generate import GenerateEngine
from worker.loader import load
from worker.loader.source import DEMO_FOLDER
from worker.vetting import Refusal, vet, weights


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
        ({"auto_map": {"AutoConfig": "own.Config"}}, "has auto_map: it asks for code of its own, which is never run"),
        ({"text_config": [{"deep": {"auto_map": None}}]}, "has auto_map"),
        ({"custom_pipelines": {}}, "has custom_pipelines"),
        ({"keypoint_detector_config": {"trust_remote_code": True}}, "has trust_remote_code"),
        ({"_attn_implementation": "org/kernel"}, "has _attn_implementation: it can name code to fetch and run"),
        ({"_attn_implementation_internal": "org/kernel"}, "has _attn_implementation_internal"),
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
    engine = GenerateEngine(load(ModelSpec(str(folder), quantization=Quantization(Kind.NONE)), "cpu"), rows=1)
    engine.add(RequestKey("job", 0), Request(0, "0", messages=({"role": "user", "content": "{{ 7 * 7 }}"},)))
    (output,) = engine.step()
    assert output.error is not None
    assert output.error.code == ErrorCode.CHAT_TEMPLATE_ERROR
    assert not proof.exists()
