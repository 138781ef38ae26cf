"""Models from folders, really quantized, and every way in which that can go wrong."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from batchmill.jobs.errors import ModelError
from batchmill.jobs.models.digests import Digests
from batchmill.jobs.models.identity import of_commit, of_model
from batchmill.jobs.models.quantization import Quantization
from batchmill.jobs.models.spec import ModelSpec
from batchmill.jobs.requests.generation import GenerationRequest, SamplingParams
from batchmill.jobs.requests.request import RequestKey
from batchmill.worker.engine.generate.engine import GenerateEngine
from batchmill.worker.engine.options import EngineOptions
from batchmill.worker.models import load as loader
from batchmill.worker.models import source
from batchmill.worker.models.load import load, loading
from tests.support.models.tiny import CONTEXT_TOKENS, SPECIAL_TOKENS, save_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def spec(folder: Path | str, quantization: str = "none") -> ModelSpec:
    return ModelSpec(str(folder), quantization=Quantization.parse(quantization))


def rewrite(file: Path, **changes: Any) -> None:
    """Changes keys of a JSON file; None removes one."""
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


def test_an_unquantized_model_on_a_cpu_is_float32(folder: Path) -> None:
    loaded = load(spec(folder), "cpu")
    assert {each.dtype for each in loaded.model.parameters()} == {torch.float32}
    assert loaded.device == torch.device("cpu")
    assert loaded.vocabulary == len(SPECIAL_TOKENS) + 256
    assert (loaded.context_tokens, loaded.end_token_ids, loaded.pad_token_id) == (CONTEXT_TOKENS, (1, 3), 2)
    assert loaded.cache_token_bytes == 2 * 2 * 2 * 16 * 4, "keys and values of 2 layers, 2 heads of 16, 4 bytes"
    assert loaded.weights_bytes == sum(each.nbytes for each in loaded.model.parameters())
    assert loaded.load_seconds > 0
    assert loaded.commit is None
    assert not loaded.model.training


@pytest.mark.parametrize(
    ("quantization", "layer"),
    [
        ("nf4", "Linear4bit"),
        ("fp4", "Linear4bit"),
        ("int8", "Linear8bitLt"),
    ],
)
def test_a_model_is_quantized_by_bitsandbytes_and_answers(
    folder: Path,
    quantization: str,
    layer: str,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    loaded = load(spec(folder, quantization), "cpu")
    projections = [each for name, each in loaded.model.named_modules() if name.endswith("_proj")]
    assert [type(each).__name__ for each in projections] == [layer] * 14
    asked = loaded.model.config.quantization_config
    if layer == "Linear4bit":
        assert {each.weight.quant_type for each in projections} == {quantization}
        assert asked.bnb_4bit_use_double_quant
    engine = GenerateEngine(loaded, options=EngineOptions(max_rows=4))
    for index, temperature in enumerate([0.0, 1.0, 0.0]):
        sampling = SamplingParams(max_tokens=6, temperature=temperature)
        engine.add(
            RequestKey("job", index), GenerationRequest(index, str(index), prompt="hello " * index, sampling=sampling)
        )
    outputs = engine.step()
    assert sorted(output.key.index for output in outputs) == [0, 1, 2]
    assert all(output.error is None for output in outputs)
    assert not caplog.records
    assert capfd.readouterr() == ("", ""), "nothing is said of the normal course of things"


def test_what_libraries_say_of_faults_is_a_line_of_the_log(
    folder: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with loading(spec(folder)):
        for name in ("transformers", "huggingface_hub", "torch"):
            logging.getLogger(f"{name}.somewhere").error(name)
    assert [each.getMessage() for each in caplog.records] == ["transformers", "huggingface_hub", "torch"]
    assert capfd.readouterr() == ("", ""), "and nothing comes out beside it"


@pytest.mark.parametrize(
    ("asked", "defaults"),
    [
        ({}, SamplingParams()),
        (
            {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.1, "do_sample": True},
            SamplingParams(temperature=0.6, top_p=0.9, top_k=20, repetition_penalty=1.1),
        ),
        ({"do_sample": True}, SamplingParams()),
        ({"do_sample": False}, SamplingParams(temperature=0.0)),
        ({"do_sample": False, "temperature": 0.7}, SamplingParams(temperature=0.0)),
        ({"temperature": 0.7}, SamplingParams(temperature=0.7)),
        ({"max_length": 4096, "max_new_tokens": 7}, SamplingParams()),
    ],
)
def test_the_defaults_are_what_the_checkpoint_asks_for_and_no_more(
    copy: Path, asked: dict[str, Any], defaults: SamplingParams
) -> None:
    (copy / "generation_config.json").write_text(json.dumps(asked))
    loaded = load(spec(copy), "cpu")
    assert loaded.defaults == defaults
    assert loaded.end_token_ids == (1,), "the tokenizer's"
    asked_again = loaded.model.generation_config
    assert (asked_again.temperature, asked_again.max_length, asked_again.eos_token_id) == (None, None, None)


def test_without_a_generation_config_the_model_config_names_the_end_tokens(copy: Path) -> None:
    (copy / "generation_config.json").unlink()
    rewrite(copy / "config.json", eos_token_id=[3, 0])
    loaded = load(spec(copy), "cpu")
    assert loaded.end_token_ids == (3, 0, 1)
    assert loaded.defaults == SamplingParams()


@pytest.mark.parametrize("pad_token", [None, "<beyond>"])
def test_without_a_pad_token_that_the_model_knows_an_end_token_pads(copy: Path, pad_token: str | None) -> None:
    rewrite(copy / "tokenizer_config.json", pad_token=pad_token)
    assert load(spec(copy), "cpu").pad_token_id == 1


def test_demo_is_the_bundled_folder(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "DEMO_FOLDER", copy)
    assert load(ModelSpec("demo"), "cpu").spec.model == "demo"
    monkeypatch.setattr(source, "DEMO_FOLDER", copy / "none")
    with pytest.raises(ModelError, match=r"cannot load demo \(nf4\): there is no folder .* `make demo-model`"):
        load(ModelSpec("demo"), "cpu")


def refusal(of: ModelSpec) -> str:
    """The one line of a model that cannot be loaded."""
    with pytest.raises(ModelError) as caught:
        load(of, "cpu")
    said = str(caught.value)
    assert said.startswith(f"cannot load {of}: ")
    assert "\n" not in said
    return said


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    assert "there is no folder /models/none on this machine; copy the model there" in refusal(spec("/models/none"))


def test_a_folder_without_config_is_no_model(copy: Path) -> None:
    (copy / "config.json").unlink()
    assert "holds no config.json" in refusal(spec(copy))


def test_weights_other_than_safetensors_are_not_loaded(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    assert "holds no safetensors weights" in refusal(spec(copy))


def test_broken_weights_are_an_error(copy: Path) -> None:
    (copy / "model.safetensors").write_bytes(b"\0" * 100)
    assert "model.safetensors is not a safetensors file" in refusal(spec(copy))


def test_a_broken_config_is_an_error(copy: Path) -> None:
    (copy / "config.json").write_text("{")
    assert "config.json is not JSON; copy or fetch it again" in refusal(spec(copy))


def test_an_unknown_architecture_says_which_transformers(copy: Path) -> None:
    rewrite(copy / "config.json", model_type="unheard_of")
    assert "does not know its architecture; install a newer one" in refusal(spec(copy))


def test_a_model_that_needs_code_of_its_own_is_refused(copy: Path) -> None:
    rewrite(copy / "config.json", model_type="unheard_of", auto_map={"AutoConfig": "own.Config"})
    (copy / "own.py").write_text("raise SystemExit('this code must not run')")
    assert "code of its own, which is never run" in refusal(spec(copy))


def test_nothing_is_loaded_of_a_folder_that_is_refused(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rewrite(copy / "tokenizer_config.json", deeper={"auto_map": {"AutoTokenizer": ["own.Tokenizer", None]}})
    for name in ("configuration.AutoConfig", "load.AutoModelForCausalLM", "load.AutoTokenizer"):
        monkeypatch.delattr(f"batchmill.worker.models.{name}")
    assert "its tokenizer_config.json has auto_map" in refusal(spec(copy))


def test_no_caller_can_ask_for_a_models_own_code() -> None:
    text = "".join(file.read_text() for file in Path(loader.__file__).parent.rglob("*.py"))
    calls = re.findall(r"from_(?:pretrained|config)\(", text)
    assert len(calls) >= 3
    assert text.count("trust_remote_code=False") == text.count("trust_remote_code=") == len(calls)
    assert text.count("use_safetensors=True") == text.count("AutoModelForCausalLM.from_pretrained(")


def test_a_model_that_does_not_continue_text_is_refused(copy: Path) -> None:
    rewrite(copy / "config.json", model_type="vit")
    assert "choose a causal language model" in refusal(spec(copy))


def test_too_little_memory_says_what_to_do(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(loader.AutoModelForCausalLM, "from_pretrained", fail)
    assert "not enough memory for it; use -q nf4" in refusal(spec(folder))


def test_an_unreachable_hub_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError) as caught:
        load(spec("some-org/some-model"), "cpu")
    said = str(caught.value)
    assert f"is not whole in the cache of this machine ({tmp_path}), and HF_HUB_OFFLINE is set; run `" in said
    assert "batchmill models pull some-org/some-model`" in said


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cached(folder: Path, cache: Path) -> Path:
    """Puts a folder where the Hub's cache keeps the commit of some-org/some-model's main branch, as links."""
    repository = cache / "models--some-org--some-model"
    snapshot = repository / "snapshots" / COMMIT
    shutil.copytree(folder, repository / "blobs")
    snapshot.mkdir(parents=True)
    for file in sorted((repository / "blobs").iterdir()):
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return snapshot


@pytest.fixture
def snapshot(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return cached(folder, tmp_path / "hub")


def test_a_model_of_the_hub_says_which_commit_it_is(snapshot: Path) -> None:
    loaded = load(spec("some-org/some-model"), "cpu")
    assert loaded.commit == COMMIT
    assert loaded.content == of_commit(COMMIT)
    assert Path(loaded.model.name_or_path) == snapshot, "the folder that was looked over"


def test_a_model_of_the_hub_is_looked_over_like_a_folder(snapshot: Path) -> None:
    rewrite(snapshot / "config.json", _attn_implementation_internal="some-org/some-kernel")
    assert "its config.json has _attn_implementation_internal" in refusal(spec("some-org/some-model"))


def test_a_model_says_what_it_consists_of_and_its_memory_is_the_homes(copy: Path, tmp_path: Path) -> None:
    beats: list[bool] = []
    found = load(spec(copy), "cpu", digests=Digests(tmp_path / "home", progress=lambda: beats.append(True))).content
    assert found.identity == of_model(copy, Digests()).identity
    assert list((tmp_path / "home" / "digests").glob("*.json"))
    assert beats
    assert found.changed() is None
    rewrite(copy / "config.json", attention_dropout=0.5)
    assert found.changed() == "configuration"


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "generation_config.json"])
def test_a_file_that_is_written_while_it_is_loaded_is_refused(
    copy: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def read_and_write(*arguments: Any) -> Any:
        model = loader_read(*arguments)
        content = (copy / name).read_bytes()
        (copy / name).write_bytes(content + b" ")
        return model

    loader_read = loader.read_model
    monkeypatch.setattr(loader, "read_model", read_and_write)
    assert "changed while it was loaded; start again when nobody writes to its files" in refusal(spec(copy))
