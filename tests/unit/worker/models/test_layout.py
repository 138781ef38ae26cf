"""A model laid out over a CPU that is too small for it, and its disk: the place of each layer, and its answers."""

from __future__ import annotations

import json
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from batchmill.jobs.errors import ModelError
from batchmill.jobs.models.quantization import Quantization
from batchmill.jobs.models.spec import ModelSpec
from batchmill.jobs.requests.generation import GenerationRequest, SamplingParams
from batchmill.jobs.requests.request import RequestKey
from batchmill.jobs.runtime.process.process import Process
from batchmill.worker.devices.placement import Placement
from batchmill.worker.engine.options import Dequantize, EngineOptions
from batchmill.worker.engine.transformers_kind import serve
from batchmill.worker.models.layout import Layout
from batchmill.worker.models.load import LoadedModel, load
from tests.support.models.tiny import save_tiny_model

OFFLOADED_INT8 = "int8:fp32_cpu_offload=true"
OPTIONS = EngineOptions(max_rows=4, cache_bytes=2**22, dequantize=Dequantize.NEVER)
GREEDY = SamplingParams(max_tokens=8, temperature=0.0)
IDS = torch.arange(24)[None] * 7 % 200


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def spec(folder: Path, quantization: str = "none") -> ModelSpec:
    return ModelSpec(str(folder), quantization=Quantization.parse(quantization))


def on_disk(room: str, folder: Path) -> Placement:
    return Placement.parse("cpu", max_memory=f"cpu={room}", offload="disk", offload_folder=str(folder))


def mapped(folder: Path, value: Any, **flags: str) -> Placement:
    file = folder / "map.json"
    file.write_text(json.dumps(value))
    return Placement.parse("cpu", device_map=str(file), **flags)


@torch.inference_mode()
def logits(loaded: LoadedModel) -> torch.Tensor:
    found: torch.Tensor = loaded.model(input_ids=IDS, use_cache=False).logits
    return found


def answers(loaded: LoadedModel, kind: str = "continuous") -> list[str]:
    engine = serve(loaded, options=OPTIONS)
    assert engine.limits.kind == kind
    for index in range(6):
        engine.add(
            RequestKey("j", index), GenerationRequest(index, f"r{index}", prompt="ab" * (index + 1), sampling=GREEDY)
        )
    outputs = []
    while engine.waiting or engine.active:
        outputs += engine.step()
    return [each.payload[0].text for each in sorted(outputs, key=lambda each: each.key)]


def test_a_model_that_fits_is_whole_and_has_no_hooks(folder: Path, tmp_path: Path) -> None:
    loaded = load(spec(folder), "cpu", placement=on_disk("10MB", tmp_path))
    assert loaded.layout == Layout()
    assert not any(hasattr(each, "_hf_hook") for each in loaded.model.modules())


@pytest.mark.parametrize(("room", "layers"), [("400KB", (("cpu", 1), ("disk", 1))), ("200KB", (("disk", 2),))])
def test_what_does_not_fit_waits_on_disk_and_gives_the_same_answers(
    folder: Path, tmp_path: Path, room: str, layers: tuple[tuple[str, int], ...]
) -> None:
    whole, loaded = load(spec(folder), "cpu"), load(spec(folder), "cpu", placement=on_disk(room, tmp_path))
    assert loaded.layout.layers == layers
    assert loaded.layout.offloaded
    assert not loaded.layout.spread
    assert any(each.device.type == "meta" for each in loaded.model.parameters())
    assert torch.equal(logits(loaded), logits(whole))
    assert answers(loaded) == answers(whole)
    assert any(each.device.type == "meta" for each in loaded.model.parameters()), "the weights have gone again"


def test_where_the_layers_went_is_logged(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load(spec(folder), "cpu", placement=on_disk("400KB", tmp_path))
    assert "1 on cpu, 1 on disk" in capsys.readouterr().out


def test_int8_keeps_what_is_offloaded_as_it_was(folder: Path, tmp_path: Path) -> None:
    loaded = load(spec(folder, OFFLOADED_INT8), "cpu", placement=on_disk("200KB", tmp_path))
    kinds = [type(layer.mlp.up_proj).__name__ for layer in loaded.model.model.layers]
    assert loaded.layout.layers == (("cpu", 1), ("disk", 1))
    assert kinds == ["Linear8bitLt", "Linear"]
    plain = logits(load(spec(folder), "cpu"))
    assert 0 < (logits(loaded) - plain).abs().max() < 0.1 * plain.abs().max()
    assert len(answers(loaded)) == 6


@pytest.mark.parametrize(("quantization", "room"), [("nf4", "100KB"), ("fp4", "100KB"), ("int8", "200KB")])
def test_a_quantization_that_cannot_be_offloaded_is_refused_before_loading(
    folder: Path, tmp_path: Path, quantization: str, room: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loads(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("batchmill.worker.models.load.AutoModelForCausalLM.from_pretrained", loads)
    with pytest.raises(ModelError, match=f"-q {quantization} cannot be offloaded; choose -q int8:fp32_cpu_offload"):
        load(spec(folder, quantization), "cpu", placement=on_disk(room, tmp_path))


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantized_model_that_fits_does_not_mind_that_it_might_be_offloaded(
    folder: Path, tmp_path: Path, quantization: str
) -> None:
    loaded = load(spec(folder, quantization), "cpu", placement=on_disk("10MB", tmp_path))
    assert loaded.layout == Layout()


def test_without_offloading_a_model_that_does_not_fit_is_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"does not fit into 390.6 KiB on cpu.*--max-memory"):
        load(spec(folder), "cpu", placement=Placement.parse("cpu", max_memory="cpu=400KB"))


def test_an_explicit_map_is_followed(folder: Path, tmp_path: Path) -> None:
    places = {"model": "cpu", "model.layers.1": "disk", "lm_head": "disk"}
    loaded = load(spec(folder), "cpu", placement=mapped(tmp_path, places, offload_folder=str(tmp_path)))
    first, second = loaded.model.model.layers
    assert (first.mlp.up_proj.weight.device.type, second.mlp.up_proj.weight.device.type) == ("cpu", "meta")
    assert loaded.layout.layers == (("cpu", 1), ("disk", 1))
    assert torch.equal(logits(loaded), logits(load(spec(folder), "cpu")))


@pytest.mark.parametrize(
    ("places", "said"),
    [
        ({"model": "cpu", "lm_heads": "cpu"}, "it has no module 'lm_heads'; is it 'lm_head'"),
        ({"model.layers.2": "cpu"}, "it has no module 'model.layers.2'"),
        ({"model": "cpu"}, "says of no device for lm_head.weight"),
    ],
)
def test_a_map_of_other_modules_is_refused_in_one_line(
    folder: Path, tmp_path: Path, places: dict[str, str], said: str
) -> None:
    with pytest.raises(ModelError, match=said) as refused:
        load(spec(folder), "cpu", placement=mapped(tmp_path, places))
    assert "\n" not in str(refused.value)


def test_several_devices_fall_back_to_generate_with_the_reason(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spread = Layout((("model.layers.0", "cuda:0"), ("model", "cuda:1")), (("cuda:0", 1), ("cuda:1", 1)))
    assert spread.spread
    loaded = replace(load(spec(folder), "cpu"), layout=spread)
    assert len(answers(loaded, kind="generate")) == 6
    assert "its layers are spread over several devices" in capsys.readouterr().out


def test_the_cache_is_where_the_layers_are_and_that_of_offloaded_ones_on_the_first_device() -> None:
    assert Layout().parts(["cuda:0"]) == [1.0]
    layers = (("cuda:0", 2), ("cuda:1", 4), ("cpu", 1), ("disk", 1))
    assert Layout((("a", "cuda:0"), ("b", "cuda:1")), layers).parts(["cuda:0", "cuda:1"]) == [0.5, 0.5]


def test_an_offload_folder_is_this_processs_own_and_loses_what_dead_ones_left(folder: Path, tmp_path: Path) -> None:
    host = socket.gethostname()
    mine = Process.own()
    assert mine is not None
    past = replace(mine, start_ticks=mine.start_ticks - 1)  # had the pid that this process has now
    dead, elsewhere = tmp_path / f"batchmill-{host}-{past}", tmp_path / f"batchmill-x-{past}"
    unknown = tmp_path / f"batchmill-{host}-999999999"
    contained = tmp_path / f"batchmill-{host}-{replace(past, namespace=1)}"
    other = tmp_path / "photos"
    for each in (dead, elsewhere, unknown, contained, other):
        each.mkdir()
    load(spec(folder), "cpu", placement=on_disk("400KB", tmp_path))
    assert not dead.exists()
    assert all(each.exists() for each in (elsewhere, unknown, contained, other))
    assert (tmp_path / f"batchmill-{host}-{mine}").is_dir()


def test_an_offload_folder_that_cannot_be_made_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match=r"--offload-folder .*file.* cannot be used"):
        load(spec(folder), "cpu", placement=on_disk("400KB", tmp_path / "file"))
