"""Logits that are NaN: an error of the one request, never an answer, and no harm to the rest of the batch."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from batchmill.jobs.errors import ModelError
from batchmill.jobs.models.quantization import Kind, Quantization
from batchmill.jobs.models.spec import ModelSpec
from batchmill.jobs.requests.generation import GenerationRequest, SamplingParams
from batchmill.jobs.requests.request import Output, RequestKey
from batchmill.worker.engine import Engine
from batchmill.worker.engine.continuous.engine import ContinuousEngine
from batchmill.worker.engine.generate.engine import GenerateEngine
from batchmill.worker.engine.options import EngineChoice, EngineOptions
from batchmill.worker.engine.sampling.sampler import Sampler
from batchmill.worker.engine.transformers_kind import serve
from batchmill.worker.models.load import LoadedModel, load
from tests.support.models.families import load_alphabet, load_family
from tests.support.models.tiny import build_tokenizer, save_tiny_model

GREEDY = SamplingParams(max_tokens=6, temperature=0.0)
NAN, INF = float("nan"), float("inf")
Make = Callable[..., Engine]


def token(text: str) -> int:
    number = build_tokenizer().convert_tokens_to_ids(text)
    assert isinstance(number, int)
    return number


def spoiled(model: LoadedModel, *texts: str) -> LoadedModel:
    """The model without numbers for these tokens."""
    with torch.no_grad():
        for text in texts:
            model.model.get_input_embeddings().weight[token(text)] = NAN
    return model


@pytest.fixture(scope="module")
def clean() -> LoadedModel:
    """A model that hardly says Z by itself."""
    model = load_family("llama-grouped")
    with torch.no_grad():
        model.model.get_output_embeddings().weight[token("Z")] = 0.0
    return model


@pytest.fixture(scope="module")
def broken(clean: LoadedModel) -> LoadedModel:
    """The same, where Z has no numbers."""
    return spoiled(replace(clean, model=copy.deepcopy(clean.model)), "Z")


@pytest.fixture(params=["generate", "in turn", "ahead"])
def make(request: pytest.FixtureRequest) -> Make:
    """Makes engines, of both kinds."""

    def make_engine(model: LoadedModel, *, rows: int = 8, **given: Any) -> Engine:
        if request.param == "generate":
            return GenerateEngine(model, options=EngineOptions(max_rows=rows))
        options = EngineOptions(max_rows=rows)
        engine = ContinuousEngine(model, options=options, ahead=request.param == "ahead", **given)
        request.addfinalizer(engine.close)
        return engine

    return make_engine


def asked(index: int, text: str, **sampling: Any) -> GenerationRequest:
    return GenerationRequest(index, str(index), prompt=text, sampling=replace(GREEDY, **sampling))


def answers(engine: Engine, *requests: GenerationRequest) -> list[Output]:
    for request in requests:
        engine.add(RequestKey("job", request.index), request)
    outputs: list[Output] = []
    while engine.waiting or engine.active:
        outputs += engine.step()
    return sorted(outputs, key=lambda output: output.key.index)


def said(output: Output) -> list[str]:
    return [each.text for each in output.payload]


def code(output: Output) -> str | None:
    return None if output.error is None else output.error.code


OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 1.0, "seed": 1},
    "nucleus": {"temperature": 1.0, "seed": 1, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.5},
    "biases": {"logit_bias": ((70, 3.0),), "min_tokens": 3},
    "logprobs": {"logprobs": True, "top_logprobs": 3},
    "choices": {"n": 3, "temperature": 1.0, "seed": 1},
    "grammar": {"response_format": {"type": "regex", "regex": "[a-z]{3,9}"}},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_prompt_without_numbers_is_an_error_and_its_neighbours_are_answered_as_alone(
    clean: LoadedModel, broken: LoadedModel, make: Make, name: str
) -> None:
    options = OPTIONS[name]
    texts = ["abc", "aZc", "some longer prompt, of more words", "ends in Z", "xyz"]
    engine = make(broken)
    if isinstance(engine, GenerateEngine) and options.keys() & {"logprobs", "n", "response_format"}:
        pytest.skip("the generate engine has no such option")
    outputs = answers(engine, *(asked(place, text, **options) for place, text in enumerate(texts)))
    assert [code(each) for each in outputs] == [None, "not_a_number", None, "not_a_number", None]
    alone = make(clean, rows=1)
    for place in (0, 2, 4):
        assert said(outputs[place]) == said(answers(alone, asked(place, texts[place], **options))[0])
    for place in (1, 3):
        bad = outputs[place]
        assert (bad.payload, bad.prompt_tokens, bad.completion_tokens) == ((), 1 + len(texts[place]), 0)
        assert bad.error is not None
        assert "logits for token 1 of the answer are not numbers" in bad.error.message


def test_numbers_may_end_in_the_middle_of_an_answer(make: Make) -> None:
    engine = make(spoiled(load_alphabet(), "m"))
    outputs = answers(engine, asked(0, "a", max_tokens=30), asked(1, "n", max_tokens=30), asked(2, "m", max_tokens=1))
    assert [code(each) for each in outputs] == ["not_a_number", None, "not_a_number"]
    assert outputs[0].error is not None
    assert "token 13 of the answer" in outputs[0].error.message
    assert outputs[1].payload[0].text == "opqrstuvwxyz{|}~"


def test_what_a_row_would_say_after_its_end_counts_for_nothing(make: Make) -> None:
    outputs = answers(make(spoiled(load_alphabet(), "</s>")), asked(0, "{"), asked(1, "a", max_tokens=40))
    assert [each.payload[0].text for each in outputs] == ["|}~", "bcdefghijklmnopqrstuvwxyz{|}~"]


def test_a_place_of_the_cache_is_clean_for_the_next_row(clean: LoadedModel, broken: LoadedModel, make: Make) -> None:
    engine = make(broken, rows=1)
    bad, good = asked(0, "a prompt that is longer than the next one, with Z"), asked(1, "short")
    assert code(answers(engine, bad)[0]) == "not_a_number"
    assert answers(engine, good)[0].payload == answers(make(clean), good)[0].payload


def test_a_beginning_is_not_taken_from_a_row_without_numbers(
    clean: LoadedModel, broken: LoadedModel, make: Make
) -> None:
    begin = "the very same beginning of more than one block of tokens, "
    bad, good = asked(0, f"{begin}and then Z{'z' * 60}", max_tokens=1), asked(1, f"{begin}no more")
    outputs = answers(make(broken, rows=2, step_tokens=40), bad, good)
    assert code(outputs[0]) == "not_a_number"
    assert outputs[1].payload == answers(make(clean), good)[0].payload


def test_a_row_without_numbers_may_be_cancelled(broken: LoadedModel, make: Make) -> None:
    engine = make(broken)
    for index, text in enumerate(["aZc", "aZd", "abc"]):
        engine.add(RequestKey("job", index), asked(index, text))
    engine.cancel([RequestKey("job", 0)])
    outputs = answers(engine)
    assert [(each.key.index, code(each)) for each in outputs] == [(1, "not_a_number"), (2, None)]


@pytest.mark.parametrize("name", ["greedy", "sampled", "penalties", "biases", "logprobs"])
def test_a_row_is_sound_while_its_largest_logit_is_a_number(name: str) -> None:
    rows = [[1.0, 2.0], [NAN, 2.0], [1.0, NAN], [INF, 2.0], [-INF, -INF], [-INF, 2.0], [NAN, INF], [-INF, INF]]
    options = {**OPTIONS[name], **({"logit_bias": ((1, -INF),)} if name == "biases" else {})}
    sampler = Sampler(batch_slots=len(rows), vocabulary=2, device=torch.device("cpu"))
    for batch_slot in range(len(rows)):
        sampler.enter(batch_slot, replace(GREEDY, **options), prompt=[0])
    for dtype in (torch.float32, torch.bfloat16):
        sound = sampler.sample(range(len(rows)), torch.tensor(rows, dtype=dtype)).sound
        assert sound.tolist() == [True, False, False, False, False, True, False, False]


def test_a_grammar_that_leaves_nothing_is_not_the_models_fault() -> None:
    sampler = Sampler(batch_slots=1, vocabulary=2, device=torch.device("cpu"))
    sampler.enter(0, GREEDY, prompt=[0])
    none_allowed = torch.zeros(1, 1, dtype=torch.int32)
    assert sampler.sample([0], torch.tensor([[1.0, 2.0]]), allowed=none_allowed).sound.tolist() == [True]


def test_what_is_impossible_has_a_logprob_that_json_can_say(clean: LoadedModel, make: Make) -> None:
    engine = make(clean)
    if isinstance(engine, GenerateEngine):
        pytest.skip("the generate engine has no logprobs")
    only = token("x")

    def forbid(_: torch.nn.Module, __: Any, logits: torch.Tensor) -> torch.Tensor:
        return torch.full_like(logits, -INF).index_fill(-1, torch.tensor([only]), 1.0)

    hook = clean.model.get_output_embeddings().register_forward_hook(forbid)
    try:
        [output] = answers(engine, asked(0, "abc", max_tokens=2, logprobs=True, top_logprobs=3))
    finally:
        hook.remove()
    assert output.payload[0].text == "xx"
    written = json.loads(output.payload_text(), parse_constant=pytest.fail)
    for each in written[0]["logprobs"]["content"]:
        assert each["logprob"] == 0.0
        assert [top["logprob"] for top in each["top_logprobs"]] == [0.0, -9999.0, -9999.0]


def spoil(folder: Path, name: str, rows: Any) -> ModelSpec:
    """Writes NaN into rows of a tensor of the folder's weights."""
    weights = load_file(folder / "model.safetensors")
    weights[name][rows] = NAN
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return ModelSpec(str(folder), quantization=Quantization(Kind.NONE))


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.1.mlp.down_proj.weight"])
def test_a_model_without_any_numbers_is_refused_by_name(tmp_path: Path, name: str) -> None:
    spec = spoil(save_tiny_model(tmp_path), name, slice(None))
    with pytest.raises(ModelError) as caught:
        load(spec, "cpu")
    assert str(caught.value).startswith(f"cannot load {spec}: its logits are not numbers (NaN or infinite)")


def test_a_model_without_numbers_for_some_tokens_is_served_by_the_engine_that_it_would_have(tmp_path: Path) -> None:
    loaded = load(spoil(save_tiny_model(tmp_path), "model.embed_tokens.weight", slice(0, 100)), "cpu")
    engine = serve(loaded, options=EngineOptions(max_rows=2))
    assert isinstance(engine, ContinuousEngine)
    engine.close()
    assert engine.limits.kind == EngineChoice.CONTINUOUS.value


def test_prompts_are_padded_with_a_token_that_has_numbers(tmp_path: Path) -> None:
    short, longer = asked(0, "ab"), asked(1, "a longer prompt than that")
    whole = load(ModelSpec(str(save_tiny_model(tmp_path)), quantization=Quantization(Kind.NONE)), "cpu")
    expected = answers(GenerateEngine(whole), short, longer)
    loaded = load(spoil(tmp_path, "model.embed_tokens.weight", token("<pad>")), "cpu")
    assert answers(GenerateEngine(loaded), short, longer) == expected
