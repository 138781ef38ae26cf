"""Loading of adapters: each is served as peft computes it, or refused in one line that says what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from batchmill.jobs.errors import ModelError
from batchmill.jobs.models.adapters import Adapter
from batchmill.jobs.models.digests import Digests
from batchmill.jobs.models.identity import of_adapter
from batchmill.jobs.requests.generation import GenerationRequest, SamplingParams
from batchmill.jobs.requests.request import RequestKey
from batchmill.worker.engine.continuous.engine import ContinuousEngine
from batchmill.worker.engine.options import EngineOptions
from batchmill.worker.models.adapters.loading import with_adapters
from batchmill.worker.models.load import LoadedModel
from batchmill.worker.models.vetting import Refusal, vet
from tests.support.models.families import FAMILIES, loaded
from tests.support.models.lora import alone, greedy, save_random_adapter

PROMPT = "some prompt"
TOKENS = 20
FAMILY = "llama-grouped"


def model(*, tied: bool = False, layers: int = 2, hidden: int = 48) -> LoadedModel:
    config = FAMILIES[FAMILY]()
    config.tie_word_embeddings, config.num_hidden_layers, config.hidden_size = tied, layers, hidden
    return loaded(config)


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    def save_adapter(*, base: LoadedModel | None = None, **asked: Any) -> Path:
        config = (base or model()).model.config
        return save_random_adapter(tmp_path / "adapter", config, **{"r": 4, "lora_alpha": 64} | asked)

    return save_adapter


def answer(base: LoadedModel, folder: Path) -> list[int]:
    """The continuous engine's answer with this adapter, in one batch with the same prompt without it."""
    held = with_adapters(base, [Adapter("a", str(folder))])
    sampling = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
    with closing(ContinuousEngine(held, options=EngineOptions(max_rows=4))) as engine:
        for index, name in enumerate([None, "a", None]):
            request = GenerationRequest(index, str(index), prompt=PROMPT, sampling=sampling, adapter=name)
            engine.add(RequestKey("job", index), request)
        rows = [each.rows[0] for each in engine._answers.values()]
        while engine.waiting or engine.active:
            engine.step()
    assert rows[0].generated == rows[2].generated != rows[1].generated
    return rows[1].generated


def refusal(folder: Path, base: LoadedModel | None = None) -> str:
    with pytest.raises(ModelError) as caught:
        with_adapters(base or model(), [Adapter("a", str(folder))])
    said = str(caught.value)
    assert said.startswith(f"cannot load the adapter a={folder}: ")
    assert "\n" not in said
    assert len(said) < 700
    return said


def rewrite(folder: Path, **changes: Any) -> Path:
    """Changes keys of an adapter's configuration."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


@pytest.mark.parametrize(
    "asked",
    [
        {"target_modules": ["lm_head"]},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["embed_tokens", "lm_head", "v_proj"]},
        {"target_modules": r".*\.1\..*(gate|up)_proj"},
        {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
        {"target_modules": "all-linear", "exclude_modules": ["down_proj"], "use_rslora": True},
        {"target_modules": "all-linear", "rank_pattern": {"q_proj": 7}, "alpha_pattern": {"layers.1.mlp.up_proj": 99}},
        {"target_modules": ["k_proj"], "lora_bias": True, "lora_dropout": 0.3},
    ],
    ids=lambda asked: str(asked.get("target_modules")) + ",".join(list(asked)[1:]),
)
def test_what_is_served_is_computed_as_by_peft(save: Callable[..., Path], asked: dict[str, Any]) -> None:
    folder = save(**asked)
    base = model()
    peft = alone(base.model, folder)
    assert answer(model(), folder) == greedy(peft, base, base.tokenizer.encode(PROMPT), TOKENS)


@pytest.mark.parametrize("beginning", [True, None, "gaussian", "eva", "orthogonal"])
def test_how_its_weights_began_does_not_matter_where_the_base_stayed(save: Callable[..., Path], beginning: Any) -> None:
    folder = save()
    wanted = answer(model(), folder)
    assert answer(model(), rewrite(folder, init_lora_weights=beginning)) == wanted


def test_a_tied_head_stays_the_bases_where_the_embedding_alone_is_changed(save: Callable[..., Path]) -> None:
    base = model(tied=True)
    folder = save(base=base, target_modules=["embed_tokens"])
    peft = alone(base.model, folder)
    assert answer(model(tied=True), folder) == greedy(peft, base, base.tokenizer.encode(PROMPT), TOKENS)


def test_weights_in_half_precision_are_widened_as_by_peft(save: Callable[..., Path]) -> None:
    folder = save()
    file = folder / "adapter_model.safetensors"
    save_file({key: each.bfloat16() for key, each in load_file(file).items()}, file)
    held = with_adapters(model(), [Adapter("a", str(folder))])
    assert {part.down.dtype for part in held.adapters[0].layers.values()} == {torch.float32}
    base = model()
    peft = alone(base.model, folder)
    assert answer(model(), folder) == greedy(peft, base, base.tokenizer.encode(PROMPT), TOKENS)


def test_an_adapter_counts_into_the_weights(save: Callable[..., Path]) -> None:
    base, folder = model(), save()
    held = with_adapters(base, [Adapter("a", str(folder))])
    floats = sum(each.numel() for each in load_file(folder / "adapter_model.safetensors").values())
    assert held.weights_bytes - base.weights_bytes == held.adapters[0].nbytes == 4 * floats
    assert all(not each._forward_hooks for each in base.model.modules()), "the model itself is as it was"


def test_an_adapter_is_known_by_the_content_of_its_files(save: Callable[..., Path]) -> None:
    base, folder = model(), save()
    file = folder / "adapter_model.safetensors"

    def identity() -> str | None:
        (held,) = with_adapters(base, [Adapter("a", str(folder))]).adapters
        assert held.adapter.identity == held.content.identity == of_adapter(folder, Digests()).identity
        return held.adapter.identity

    before = identity()
    save_file({key: each + 1 for key, each in load_file(file).items()}, file)
    assert identity() != before


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"use_dora": True}, "it is a DoRA adapter"),
        ({"modules_to_save": ["lm_head"]}, "replaces whole modules of the base (modules_to_save)"),
        ({"bias": "lora_only"}, "replaces biases of the base (bias 'lora_only')"),
        ({"trainable_token_indices": [1, 2]}, "replaces embeddings of the base"),
        ({"alora_invocation_tokens": [5]}, "sets alora_invocation_tokens, which is not served"),
    ],
    ids=lambda each: next(iter(each)) if isinstance(each, dict) else "",
)
def test_what_changes_more_than_layers_is_refused_and_can_be_merged(
    save: Callable[..., Path], asked: dict[str, Any], said: str
) -> None:
    assert said in (words := refusal(save(**asked)))
    assert "merge_and_unload" in words


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft_type": "PREFIX_TUNING"}, "peft_type 'PREFIX_TUNING', and only LORA is served"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            "over changed weights of the base (init_lora_weights 'pissa_niter_4')",
        ),
        ({"init_lora_weights": "loftq"}, "init_lora_weights 'loftq'"),
        ({"megatron_config": {"a": 1}, "megatron_core": "os"}, "sets megatron_config, which is not served"),
        ({"of_a_later_peft": 1}, "sets of_a_later_peft, which is not served"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "asks for code of its own"),
        ({"r": 5}, "at rank 5 its weights are (4, 48) and (48, 4), not (5, 48) and (48, 5)"),
        ({"r": "many"}, "TypeError"),
        ({"target_modules": ["q_proj"]}, "which is no part of what it changes in this model"),
        ({"target_modules": ["nothing"]}, "peft finds none of what it changes in this model"),
    ],
    ids=lambda each: next(iter(each)) if isinstance(each, dict) else "",
)
def test_what_a_configuration_may_not_ask_for_is_named(
    save: Callable[..., Path], changes: dict[str, Any], said: str
) -> None:
    assert said in refusal(rewrite(save(target_modules=["q_proj", "k_proj"]), **changes))


def test_an_adapter_for_another_base_is_named_with_its_layer_and_shapes(save: Callable[..., Path]) -> None:
    folder = rewrite(save(base=model(hidden=96)), base_model_name_or_path="org/other")
    said = refusal(folder)
    assert "model.layers.0.self_attn.q_proj takes 48 numbers and gives 48, and at rank 4 its weights are" in said
    assert "(4, 96) and (48, 4), not (4, 48) and (48, 4): it was made for another base ('org/other')" in said


def test_an_adapter_for_a_base_of_other_layers_is_named(save: Callable[..., Path]) -> None:
    folder = save(base=model(layers=3), target_modules=["q_proj"])
    assert "its weights hold base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight" in refusal(folder)
    assert "its weights lack base_model.model.model.layers.2" in refusal(
        save(target_modules=["q_proj"]), model(layers=3)
    )


def test_an_embedding_of_its_own_is_refused(save: Callable[..., Path]) -> None:
    folder = save(target_modules=["embed_tokens"])
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    [key] = [each for each in tensors if each.endswith("embed_tokens.base_layer.weight")]
    save_file(tensors | {key: tensors[key] + 1}, file)
    assert f"its weights hold {key}, which is no part" in refusal(folder)


def test_only_safetensors_of_the_folder_itself_are_read(save: Callable[..., Path], tmp_path: Path) -> None:
    folder = save()
    weights = folder / "adapter_model.safetensors"
    outside = weights.rename(tmp_path / "elsewhere.safetensors")
    (folder / "adapter_model.bin").write_bytes(b"\x80\x02.")
    assert "adapter_model.safetensors" in refusal(folder)
    weights.symlink_to(outside)
    assert "a link that leaves the folder" in refusal(folder)
    weights.unlink()
    weights.write_bytes(outside.read_bytes()[:-1])
    assert "its safetensors header tells of" in refusal(folder)
    weights.write_bytes(outside.read_bytes())
    (folder / "adapter_config.json").write_text("[]")
    assert "is no JSON object" in refusal(folder)
    (folder / "adapter_config.json").unlink()
    assert "adapter_config.json" in refusal(folder)


def test_an_adapters_folder_in_place_of_a_model_says_how_to_serve_it(save: Callable[..., Path]) -> None:
    folder = save()
    with pytest.raises(Refusal, match=f"serve it with --adapter NAME={folder} over its base"):
        vet(folder)


def test_a_folder_that_is_not_here_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"no adapter's folder {tmp_path / 'gone'} on this machine"):
        with_adapters(model(), [Adapter("a", str(tmp_path / "gone"))])
