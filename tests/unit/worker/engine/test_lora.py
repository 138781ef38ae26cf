"""Adapters beside a quantized model: every answer is that of its adapter alone under peft, whatever runs beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from batchmill.jobs.models.adapters import Adapter, check_all, from_json, to_json
from batchmill.jobs.models.quantization import Kind, Quantization
from batchmill.jobs.models.spec import DEMO, ModelSpec
from batchmill.jobs.requests.generation import GenerationRequest, SamplingParams
from batchmill.jobs.requests.request import ErrorCode, Output, RequestKey
from batchmill.worker.cli.worker import _arguments
from batchmill.worker.devices.placement import Placement
from batchmill.worker.engine import Engine
from batchmill.worker.engine.continuous.engine import ContinuousEngine
from batchmill.worker.engine.continuous.scheduling.prefixes import BLOCK_TOKENS, Prefixes
from batchmill.worker.engine.continuous.scheduling.step import Row
from batchmill.worker.engine.continuous.support import Unsupported, cache_shape
from batchmill.worker.engine.echo.engine import EchoEngine
from batchmill.worker.engine.generate.engine import GenerateEngine
from batchmill.worker.engine.options import Dequantize, EngineOptions
from batchmill.worker.engine.transformers_kind import serve
from batchmill.worker.models.adapters.loading import with_adapters
from batchmill.worker.models.load import LoadedModel, load
from batchmill.worker.process.order import ORDER_VARIABLE, ChildOrder
from tests.support.models.families import FAMILIES, loaded
from tests.support.models.lora import alone, greedy, save_random_adapter, save_trained_adapter, sum_question

SHARED = "a beginning that many prompts have in common, "
PROMPTS = [
    "a",
    "some longer prompt, which is longer than the window of those models that have one",
    SHARED + "first",
    "xyz",
    SHARED + "second, which goes on for some time until it is longer than the others are",
    SHARED,
    SHARED,
    SHARED,
]
ANSWER_TOKENS = [1, 20, 7, 30, 12, 25, 25, 25]
#: The adapter that answers each of them.
NAMES = ["wide", None, "narrow", "wide", None, "wide", None, "narrow"]
#: Different in rank, scale and layers; the layer that `narrow` leaves alone is the first.
WIDE: dict[str, Any] = {"r": 8, "lora_alpha": 100, "seed": 1}
NARROW: dict[str, Any] = {"r": 3, "lora_alpha": 40, "use_rslora": True, "layers_to_transform": [1], "seed": 2}
#: Layers of attention by what a family calls them, where it is not q_proj and v_proj.
ATTENTION = {"phi3": ["qkv_proj"], "gpt2": ["c_attn"], "gpt-neox": ["query_key_value"]}
SMALL_CACHE_TOKENS = 256
WAYS: dict[str, dict[str, Any]] = {
    "rows": {"rows": 8},
    "one row": {"rows": 1, "ahead": True},
    "pieces": {"rows": 4, "step_tokens": 9, "ahead": True},
    "full": {"rows": 7, "cache_tokens": SMALL_CACHE_TOKENS},
    "deterministic": {"rows": 4, "deterministic": True},
}
Folders = Mapping[str | None, Path]


def adapters(folders: Folders) -> list[Adapter]:
    return [Adapter(name, str(folder)) for name, folder in folders.items() if name is not None]


def request(index: int, prompt: str, name: str | None, **sampling: Any) -> GenerationRequest:
    asked = SamplingParams(**{"temperature": 0.0, "max_tokens": 24} | sampling)
    return GenerationRequest(index, str(index), prompt=prompt, sampling=asked, adapter=name)


def outputs(engine: Engine, requests: Sequence[GenerationRequest]) -> list[Output]:
    """In the order of the requests."""
    for each in requests:
        engine.add(RequestKey("job", each.index), each)
    found: dict[int, Output] = {}
    while engine.waiting or engine.active:
        found.update((each.key.index, each) for each in engine.step())
    return [found[each.index] for each in requests]


def texts(engine: Engine, requests: Sequence[GenerationRequest]) -> list[str]:
    return [each.payload[0].text for each in outputs(engine, requests)]


def random_model(family: str) -> LoadedModel:
    """The same weights every time; what it says is not just the token that it read."""
    config = FAMILIES[family]()
    config.tie_word_embeddings = False
    return loaded(config)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def folders(family: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two random adapters for a family."""
    root = tmp_path_factory.mktemp(family)
    attention = ATTENTION.get(family, ["q_proj", "v_proj"])
    config = random_model(family).model.config
    return {
        "wide": save_random_adapter(root / "wide", config, **WIDE),
        "narrow": save_random_adapter(root / "narrow", config, **NARROW, target_modules=attention),
    }


@pytest.fixture(scope="module")
def wanted(family: str, folders: dict[str, Path]) -> list[list[int]]:
    """The answers of each adapter alone under peft."""
    found = {}
    for name in (None, *folders):
        base = random_model(family)
        model = alone(base.model, folders[name] if name else None)
        for place in (place for place, each in enumerate(NAMES) if each == name):
            tokens = base.tokenizer.encode(PROMPTS[place])
            found[place] = greedy(model, base, tokens, ANSWER_TOKENS[place])
    return [found[place] for place in range(len(PROMPTS))]


def requests() -> list[GenerationRequest]:
    return [
        request(index, prompt, name, max_tokens=tokens, ignore_eos=True)
        for index, (prompt, name, tokens) in enumerate(zip(PROMPTS, NAMES, ANSWER_TOKENS, strict=True))
    ]


def answered(
    model: LoadedModel, *, rows: int, cache_tokens: int | None = None, deterministic: bool = False, **given: Any
) -> list[list[int]]:
    """The tokens that the continuous engine answers with."""
    cache_bytes = None if cache_tokens is None else cache_tokens * cache_shape(model).token_bytes
    options = EngineOptions(max_rows=rows, cache_bytes=cache_bytes, deterministic=deterministic)
    with closing(ContinuousEngine(model, options=options, **given)) as engine:
        for each in requests():
            engine.add(RequestKey("job", each.index), each)
        rows_of = [answer.rows[0] for answer in engine._answers.values()]
        while engine.waiting or engine.active:
            assert all(output.error is None for output in engine.step())
    return [row.generated for row in rows_of]


@pytest.mark.parametrize("way", WAYS)
def test_mixed_rows_answer_as_each_adapter_does_alone(
    family: str, folders: dict[str, Path], wanted: list[list[int]], way: str
) -> None:
    model = with_adapters(random_model(family), adapters(folders))
    assert answered(model, **WAYS[way]) == wanted
    assert len({tuple(each) for each in wanted[-3:]}) == 3, "the adapters change nothing"


@pytest.mark.parametrize("family", ["llama-grouped", "phi3", "gpt2"], indirect=True)
def test_the_generate_engine_answers_as_each_adapter_does_alone(
    family: str, folders: dict[str, Path], wanted: list[list[int]]
) -> None:
    model = with_adapters(random_model(family), adapters(folders))
    said = texts(GenerateEngine(model, options=EngineOptions(max_rows=8)), requests())
    assert said == [model.tokenizer.decode(each, skip_special_tokens=True) for each in wanted]


QUESTIONS = [sum_question(left, right) for left, right in ((18, 24), (17, 25), (60, 11))]
TRAINED: dict[str, tuple[str, dict[str, Any]]] = {
    "words": ("I do not count.", {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}),
    "zero": ("0", {"r": 4, "lora_alpha": 4, "use_rslora": True, "target_modules": ["q_proj", "v_proj", "up_proj"]}),
}


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters that were trained over the demo model in nf4."""
    root = tmp_path_factory.mktemp("trained")
    return {name: save_trained_adapter(root / name, answer, **asked) for name, (answer, asked) in TRAINED.items()}


def demo(kind: Kind) -> LoadedModel:
    return load(ModelSpec(DEMO, quantization=Quantization(kind)), "cpu")


def chats(names: Sequence[str | None]) -> list[GenerationRequest]:
    """Every question to every adapter, in turn."""
    sampling = SamplingParams(temperature=0.0, max_tokens=24)
    return [
        GenerationRequest(
            index, str(index), messages=({"role": "user", "content": question},), sampling=sampling, adapter=name
        )
        for index, (question, name) in enumerate((question, name) for question in QUESTIONS for name in names)
    ]


@pytest.mark.parametrize("kind", [Kind.NF4, Kind.FP4, Kind.INT8, Kind.NONE])
def test_trained_adapters_give_the_tokens_of_peft_over_every_quantization(kind: Kind, trained: dict[str, Path]) -> None:
    """One row at a time, and the weights as bitsandbytes has them: then transformers computes the same shapes."""
    names = [None, *trained]
    model = with_adapters(demo(kind), adapters(trained))
    options = EngineOptions(max_rows=1, dequantize=Dequantize.NEVER)
    with closing(ContinuousEngine(model, options=options)) as engine:
        for each in chats(names):
            engine.add(RequestKey("job", each.index), each)
        rows = [answer.rows[0] for answer in engine._answers.values()]
        while engine.waiting or engine.active:
            engine.step()
    for name in names:
        base = demo(kind)
        peft = alone(base.model, trained[name] if name else None)
        for row in rows:
            if row.prompt.adapter == name:
                assert row.generated == greedy(peft, base, row.prompt.tokens, 24, ends=True)


@pytest.mark.parametrize("kind", [Kind.NF4, Kind.INT8])
@pytest.mark.parametrize("engine", ["continuous", "generate"])
def test_trained_adapters_change_their_own_answers_alone(kind: Kind, engine: str, trained: dict[str, Path]) -> None:
    model = with_adapters(demo(kind), adapters(trained))
    asked = chats([None, *trained])
    if engine == "generate":
        said = texts(GenerateEngine(model, options=EngineOptions(max_rows=16)), asked)
    else:
        with closing(ContinuousEngine(model, options=EngineOptions(max_rows=16))) as continuous:
            said = texts(continuous, asked)
    learnt = [answer for answer, _ in TRAINED.values()]
    assert said == [text for right in ("42", "42", "71") for text in (right, *learnt)]


def test_layers_that_wait_on_a_disk_are_adapted_where_they_compute(trained: dict[str, Path], tmp_path: Path) -> None:
    placement = Placement.parse("cpu", max_memory="cpu=2MiB", offload="disk", offload_folder=str(tmp_path))
    spec = ModelSpec(DEMO, quantization=Quantization(Kind.NONE))
    model = with_adapters(load(spec, "cpu", placement=placement), adapters(trained))
    assert any(each.device.type == "meta" for each in model.model.parameters())
    with closing(ContinuousEngine(model, options=EngineOptions(max_rows=16))) as engine:
        said = texts(engine, chats([None, *trained]))
    learnt = [answer for answer, _ in TRAINED.values()]
    assert said == [text for right in ("42", "42", "71") for text in (right, *learnt)]


@pytest.mark.parametrize("adapter", ["wide", "narrow"])
@pytest.mark.parametrize("family", ["llama-grouped"], indirect=True)
def test_every_choice_of_a_request_is_its_adapters(family: str, folders: dict[str, Path], adapter: str) -> None:
    model = with_adapters(random_model(family), adapters(folders))
    with closing(ContinuousEngine(model, options=EngineOptions(max_rows=8))) as engine:
        mixed = [
            request(0, SHARED, None, n=2, max_tokens=9),
            request(1, SHARED, adapter, n=3, max_tokens=9),
            request(2, SHARED, adapter, max_tokens=9),
        ]
        base, several, single = outputs(engine, mixed)
    assert [each.text for each in several.payload] == [single.payload[0].text] * 3
    assert base.payload[0].text == base.payload[1].text != single.payload[0].text


@pytest.mark.parametrize("family", ["llama-grouped", "gpt2"], indirect=True)
def test_deterministic_answers_are_equal_bits_alone_and_in_company_of_other_adapters(
    family: str, folders: dict[str, Path]
) -> None:
    model = with_adapters(random_model(family), adapters(folders))
    options = EngineOptions(max_rows=5, deterministic=True)

    def said(chosen: Sequence[GenerationRequest]) -> dict[int, Any]:
        with closing(ContinuousEngine(model, options=options)) as engine:
            return {each.key.index: each.payload for each in outputs(engine, chosen)}

    asked = [replace(each, sampling=replace(each.sampling, logprobs=True, top_logprobs=5)) for each in requests()]
    together = said(asked)
    for each in asked:
        assert said([each])[each.index] == together[each.index]


@pytest.mark.parametrize("family", ["llama-grouped"], indirect=True)
def test_rows_of_other_adapters_share_no_beginning(family: str, folders: dict[str, Path]) -> None:
    model = with_adapters(random_model(family), adapters(folders))
    read: list[int] = []
    with closing(ContinuousEngine(model, options=EngineOptions(max_rows=1))) as engine:
        launch = engine._executor.launch

        def counted(step: Any) -> Any:
            read.append(step.tokens)
            return launch(step)

        engine._executor.launch = counted  # type: ignore[method-assign]
        names = [None, "wide", "narrow", "wide", None]
        outputs(engine, [request(index, SHARED, name, max_tokens=1) for index, name in enumerate(names)])
    whole = len(model.tokenizer.encode(SHARED))
    assert sorted(read) == [1, 1, whole, whole, whole], "one prompt is read for each adapter, and for none"


def test_hashes_alone_do_not_make_a_beginning_common() -> None:
    tokens = list(range(2 * BLOCK_TOKENS))
    one, other = Row(list(tokens), 99, adapter=1), Row(list(tokens), 99, adapter=2)
    assert not set(one.blocks) & set(other.blocks)
    other.blocks = one.blocks
    prefixes = Prefixes[Row]()
    prefixes.enter(one)
    assert prefixes.nearest(other) is None
    assert prefixes.nearest(Row(list(tokens), 99, adapter=1)) == (one, len(tokens) - 1)


@pytest.mark.parametrize("family", ["llama-grouped"], indirect=True)
def test_a_step_without_adapters_runs_as_if_there_were_none(family: str, folders: dict[str, Path]) -> None:
    model = with_adapters(random_model(family), adapters(folders))
    layers = [each for each in model.model.modules() if isinstance(each, torch.nn.Linear)]

    def hooked() -> bool:
        return any(each._forward_hooks for each in layers)

    with closing(ContinuousEngine(model, options=EngineOptions(max_rows=8))) as engine:
        outputs(engine, [request(0, "a", "wide")])
        assert hooked()
        outputs(engine, [request(1, "a", None)])
        assert not hooked()
    plain = ContinuousEngine(random_model(family), options=EngineOptions(max_rows=8))
    with closing(plain), closing(ContinuousEngine(model, options=EngineOptions(max_rows=8))) as engine:
        asked = [request(index, PROMPTS[index], None, logprobs=True) for index in range(4)]
        assert [each.payload for each in outputs(engine, asked)] == [each.payload for each in outputs(plain, asked)]


@pytest.mark.parametrize("kind", ["echo", "generate", "continuous"])
@pytest.mark.parametrize("family", ["llama-grouped"], indirect=True)
def test_an_adapter_that_is_not_held_is_an_error_and_never_the_models_own_answer(
    family: str, folders: dict[str, Path], kind: str
) -> None:
    model = with_adapters(random_model(family), adapters({"wide": folders["wide"]}))
    engine: Any = EchoEngine(adapters=["wide"])
    if kind != "echo":
        engine = GenerateEngine(model) if kind == "generate" else ContinuousEngine(model, options=EngineOptions())
    asked = [request(0, "a b", "other"), request(1, "a b", "wide"), request(2, "a b", None)]
    unknown, *answered = outputs(engine, asked)
    assert unknown.error is not None
    assert unknown.error.code == ErrorCode.UNSUPPORTED_BY_WORKER
    assert "does not hold the adapter 'other' (it holds wide)" in unknown.error.message
    assert not unknown.payload
    assert all(each.error is None for each in answered)


class Halved(torch.nn.Module):
    """Two products of half of the tokens each, as layers of experts have them."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.inner = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        half = x.shape[1] // 2
        return torch.cat([self.inner(x[:, :half]), self.inner(x[:, half:])], dim=1)


@pytest.mark.parametrize("family", ["llama-grouped"], indirect=True)
def test_a_layer_that_sees_other_tokens_is_served_by_the_generate_engine(
    family: str, folders: dict[str, Path], wanted: list[list[int]]
) -> None:
    model = with_adapters(random_model(family), adapters(folders))
    block: Any = model.model.get_submodule("model.layers.1.mlp")
    block.down_proj = Halved(block.down_proj)
    for each in model.adapters:  # where the layer is now
        layers: Any = each.layers
        if moved := layers.pop("model.layers.1.mlp.down_proj", None):
            layers["model.layers.1.mlp.down_proj.inner"] = moved
    with pytest.raises(Unsupported, match="an adapter changes a layer that sees"):
        ContinuousEngine(model, options=EngineOptions())
    engine = serve(model, options=EngineOptions())
    assert isinstance(engine, GenerateEngine)
    said = texts(engine, requests())
    assert said == [model.tokenizer.decode(each, skip_special_tokens=True) for each in wanted]


def test_each_worker_of_a_supervisor_holds_the_adapters() -> None:
    held = check_all([Adapter("sql", "/adapters/sql"), Adapter("code", "org/code", "v2")])
    words = _arguments(ModelSpec(DEMO), None, None, False, held)
    assert [words[place + 1] for place, word in enumerate(words) if word == "--adapter"] == [
        "code=org/code@v2",
        "sql=/adapters/sql",
    ]


def test_a_child_holds_the_adapters_of_its_order(monkeypatch: pytest.MonkeyPatch) -> None:
    held = (Adapter("sql", "/adapters/sql"), Adapter("code", "org/code", "v2"))
    order = ChildOrder(1, ModelSpec(DEMO).canonical, Placement().to_json(), None, False, to_json(held), "", "", 7)
    monkeypatch.setenv(ORDER_VARIABLE, order.to_environment())
    assert from_json(ChildOrder.from_environment().adapters) == held
