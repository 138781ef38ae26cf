"""The continuous engine: each option, models that it cannot serve, and memory that runs out."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from threading import Event
from typing import Any

import pytest
import torch
from transformers import BloomConfig, Lfm2Config, Llama4TextConfig, LlamaConfig, MambaConfig, PreTrainedConfig

from batchmill.jobs.models.quantization import Kind, Quantization
from batchmill.jobs.models.spec import DEMO, ModelSpec
from batchmill.jobs.requests.generation import GenerationRequest, SamplingParams
from batchmill.jobs.requests.request import Output, RequestKey
from batchmill.worker.engine.continuous.engine import ContinuousEngine
from batchmill.worker.engine.continuous.support import Unsupported
from batchmill.worker.engine.generate.engine import GenerateEngine
from batchmill.worker.engine.grammar.grammars import Grammars, Matcher
from batchmill.worker.engine.options import EngineOptions
from batchmill.worker.engine.sampling.penalties import Penalties
from batchmill.worker.engine.transformers_kind import serve
from batchmill.worker.models.load import LoadedModel, load
from tests.support.models.families import CONTEXT_TOKENS, VOCABULARY, load_alphabet, load_family, loaded

GREEDY = SamplingParams(max_tokens=10, temperature=0.0)
Make = Callable[..., ContinuousEngine]


@pytest.fixture(scope="module")
def alphabet() -> LoadedModel:
    return load_alphabet()


@pytest.fixture(scope="module")
def llama() -> LoadedModel:
    return load_family("llama-grouped")


@pytest.fixture(params=[False, True], ids=["in turn", "ahead"])
def make(request: pytest.FixtureRequest) -> Make:
    """Makes engines, which are closed at the end; they wait for each step's tokens, or launch the next one before."""

    def make_engine(
        model: LoadedModel, *, rows: int = 8, deterministic: bool = False, **given: Any
    ) -> ContinuousEngine:
        options = EngineOptions(max_rows=rows, deterministic=deterministic)
        engine = ContinuousEngine(model, options=options, ahead=request.param, **given)
        request.addfinalizer(engine.close)
        return engine

    return make_engine


def key(index: int) -> RequestKey:
    return RequestKey("job", index)


def prompt(index: int, text: str, **sampling: Any) -> GenerationRequest:
    return GenerationRequest(index, str(index), prompt=text, sampling=replace(GREEDY, **sampling))


def answers(engine: ContinuousEngine, *requests: GenerationRequest, until: int = sys.maxsize) -> list[Output]:
    """The outputs of these requests, and of those that are there, in their order; or the first of them alone."""
    for request in requests:
        engine.add(key(request.index), request)
    outputs: list[Output] = []
    while (engine.waiting or engine.active) and len(outputs) < until:
        outputs += engine.step()
    return sorted(outputs, key=lambda output: output.key.index)


def test_unfinished_answers_are_counted_with_all_their_choices(make: Make, llama: LoadedModel) -> None:
    engine = make(llama)
    for request in (prompt(0, "ab", ignore_eos=True), prompt(1, "abc", ignore_eos=True, n=2, temperature=1.0)):
        engine.add(key(request.index), request)
    for _ in range(6):
        assert engine.step() == []
    one, two = engine.tokens_so_far()[key(0)], engine.tokens_so_far()[key(1)]
    assert 3 <= one <= 6
    assert two == 2 * one
    assert len(answers(engine)) == 2
    assert engine.tokens_so_far() == {}


def error(output: Output) -> tuple[str, str]:
    assert output.error is not None
    return output.error.code, output.error.message


def said(outputs: list[Output]) -> list[tuple[str, str, int]]:
    return [(each.payload[0].text, each.payload[0].finish_reason, each.completion_tokens) for each in outputs]


def token(model: LoadedModel, text: str) -> int:
    return int(model.tokenizer.convert_tokens_to_ids(text))


def test_an_answer_ends_at_its_end_token_stop_string_token_or_length(alphabet: LoadedModel, make: Make) -> None:
    outputs = answers(
        make(alphabet, rows=3),
        prompt(0, "z"),
        prompt(1, "a", stop=("efg",)),
        prompt(2, "a", stop=("xyz", "ij", "hijk")),
        prompt(3, "a", stop_token_ids=(token(alphabet, "f"),)),
        prompt(4, "a", max_tokens=3),
        prompt(5, "z", ignore_eos=True, max_tokens=7),
        prompt(6, "a", stop=("</s>", "c")),
    )
    assert said(outputs) == [
        ("{|}~", "stop", 5),
        ("bcd", "stop", 6),
        ("bcdefgh", "stop", 9),
        ("bcde", "stop", 5),
        ("bcd", "length", 3),
        ("{|}~", "length", 7),
        ("b", "stop", 2),
    ]


def test_nothing_ends_an_answer_before_its_min_tokens(alphabet: LoadedModel, make: Make) -> None:
    [ended, stopped] = answers(
        make(alphabet), prompt(0, "}", min_tokens=4, max_tokens=6), prompt(1, "a", min_tokens=5, stop=("c", "g"))
    )
    assert ended.completion_tokens >= 4
    assert said([stopped]) == [("bcdef", "stop", 6)]


def test_logit_bias_forbids_and_forces_tokens(alphabet: LoadedModel, make: Make) -> None:
    bias = ((token(alphabet, "b"), -100.0), (token(alphabet, "q"), 100.0))
    assert said(answers(make(alphabet), prompt(0, "a", logit_bias=bias, max_tokens=2))) == [("qq", "length", 2)]


@pytest.mark.parametrize("option", [{"logit_bias": ((VOCABULARY, 1.0),)}, {"stop_token_ids": (VOCABULARY,)}])
def test_a_token_that_the_model_has_not_is_the_error_of_its_request(
    alphabet: LoadedModel, make: Make, option: dict[str, Any]
) -> None:
    [refused, answered] = answers(make(alphabet), prompt(0, "a", **option), prompt(1, "a"))
    [name] = option
    code, message = error(refused)
    assert code == "unsupported_option"
    assert name in message
    assert answered.error is None


def test_logprobs_are_those_of_the_model_for_every_token(llama: LoadedModel, make: Make) -> None:
    text, tokens = "some prompt", 5
    [output, plain] = answers(
        make(llama), prompt(0, text, logprobs=True, top_logprobs=3, max_tokens=tokens, ignore_eos=True), prompt(1, text)
    )
    content = (output.payload[0].logprobs or {})["content"]
    ids = [llama.tokenizer.convert_tokens_to_ids(each["token"]) for each in content]
    assert len(ids) == tokens
    assert plain.payload[0].logprobs is None
    prompt_ids = llama.tokenizer.encode(text)
    row = torch.tensor([prompt_ids])
    for each in content:
        with torch.no_grad():
            wanted = llama.model(input_ids=row).logits[0, -1].log_softmax(-1)
        values, order = wanted.topk(3)
        assert each["logprob"] == pytest.approx(float(values[0]), abs=1e-4)
        assert [top["logprob"] for top in each["top_logprobs"]] == pytest.approx(values.tolist(), abs=1e-4)
        row = torch.cat([row, order[:1][None]], dim=1)


def test_n_choices_come_as_one_output_each_with_its_own_draws(llama: LoadedModel, make: Make) -> None:
    asked = {"n": 4, "temperature": 1.0, "seed": 3, "max_tokens": 12, "ignore_eos": True}
    [output, alone] = answers(make(llama, rows=3), prompt(0, "x", **asked), prompt(1, "x", **asked | {"n": 1}))
    assert output.completion_tokens == 4 * 12
    assert len({choice.text for choice in output.payload}) == 4
    assert output.payload[0] == alone.payload[0]


def test_the_same_seed_gives_the_same_answer_in_any_company(llama: LoadedModel, make: Make) -> None:
    asked: list[dict[str, Any]] = [
        {"temperature": 1.0, "seed": 1},
        {"temperature": 0.8, "seed": 2, "top_p": 0.8, "frequency_penalty": 0.5},
        {"temperature": 1.2, "seed": 3, "top_k": 7, "repetition_penalty": 1.3, "presence_penalty": 0.2},
        {"temperature": 1.0, "seed": 4, "min_p": 0.05, "logit_bias": ((70, 3.0),), "min_tokens": 8},
        {"frequency_penalty": 1.0},
        {},
    ]
    requests = [prompt(index, f"prompt {index}" * (index + 1), **each, n=2) for index, each in enumerate(asked)]
    together = answers(make(llama, rows=5, step_tokens=16), *requests)
    alone = [answers(make(llama, rows=1), request)[0] for request in requests]
    assert [each.payload for each in together] == [each.payload for each in alone]


def test_a_response_format_shapes_the_answer_of_its_row_alone(llama: LoadedModel, make: Make) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    outputs = answers(
        make(llama),
        prompt(0, "x", response_format={"type": "json_schema", "schema": schema}, max_tokens=60, temperature=1.0),
        prompt(1, "x", response_format={"type": "choice", "choice": ["yes", "no"]}),
        prompt(2, "x", response_format={"type": "regex", "regex": "[0-9]{3}-[a-f]{2}"}),
        prompt(3, "x"),
        prompt(4, "x", response_format={"type": "regex", "regex": "([0-9"}),
    )
    assert json.loads(outputs[0].payload[0].text).keys() == {"a"}
    assert outputs[1].payload[0].text in ("yes", "no")
    assert outputs[2].payload[0].text[3] == "-"
    assert {each.payload[0].finish_reason for each in outputs[:3]} == {"stop"}
    assert said(outputs[3:4]) == said(answers(make(llama), prompt(3, "x")))
    assert error(outputs[4])[0] == "invalid_response_format"


def test_a_prompt_that_the_context_does_not_hold_is_an_error(llama: LoadedModel, make: Make) -> None:
    [too_long, fits] = answers(make(llama), prompt(0, "x" * CONTEXT_TOKENS), prompt(1, "x" * (CONTEXT_TOKENS - 3)))
    assert error(too_long)[0] == "context_length_exceeded"
    assert (fits.prompt_tokens, fits.completion_tokens) == (CONTEXT_TOKENS - 2, 2)


def test_cancelled_rows_leave_before_the_next_step(llama: LoadedModel, make: Make) -> None:
    engine = make(llama, rows=4)
    for index in range(6):
        engine.add(key(index), prompt(index, f"prompt {index}", max_tokens=50, ignore_eos=True, n=1 + index % 2))
    engine.step()
    engine.cancel([key(index) for index in range(5)])
    assert engine.waiting + engine.active == 2
    assert [output.key.index for output in answers(engine)] == [5]


def test_a_request_of_several_choices_may_be_cancelled_when_some_have_ended(alphabet: LoadedModel, make: Make) -> None:
    engine = make(alphabet, rows=2)
    engine.add(key(0), prompt(0, "a", n=3))
    rows = engine._answers[key(0)].rows
    while not any(row.ended for row in rows):
        engine.step()
    assert not all(row.ended for row in rows)
    engine.cancel([key(0)])
    assert (engine.waiting, engine.active, engine.step()) == (0, 0, [])
    assert answers(engine, prompt(1, "a"))[0].error is None


@pytest.mark.parametrize("cancelled", [False, True], ids=["answered", "cancelled"])
def test_rows_go_on_while_a_grammar_is_compiled(
    alphabet: LoadedModel, make: Make, monkeypatch: pytest.MonkeyPatch, cancelled: bool
) -> None:
    compiling, go_on = Event(), Event()
    matcher = Grammars.matcher

    def slow(grammars: Grammars, response_format: Any) -> Matcher:
        compiling.set()
        assert go_on.wait(60)
        return matcher(grammars, response_format)

    monkeypatch.setattr(Grammars, "matcher", slow)
    engine = make(alphabet)
    engine.add(key(0), prompt(0, "a", response_format={"type": "choice", "choice": ["abc"]}))
    assert [each.key.index for each in answers(engine, prompt(1, "b"), until=1)] == [1]
    assert compiling.wait(60)
    assert (engine.waiting, engine.active) == (1, 0)
    assert engine.step() == []
    if cancelled:
        engine.cancel([key(0)])
    go_on.set()
    assert [each.payload[0].text for each in answers(engine)] == ([] if cancelled else ["abc"])
    assert (engine.waiting, engine.active) == (0, 0)


def test_timings_add_up_to_the_time_that_a_request_took(llama: LoadedModel, make: Make) -> None:
    outputs = answers(make(llama, rows=1), prompt(0, "x"), prompt(1, "y"))
    spent = [each.timings for each in outputs]
    assert all(each is not None and min(each.prefill_seconds, each.decode_seconds) > 0 for each in spent)
    assert max(each.queued_seconds for each in spent if each) >= min(each.decode_seconds for each in spent if each)


class Small:
    """A device that holds forwards of at most `tokens` tokens."""

    def __init__(self, engine: ContinuousEngine, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
        decoder = engine._decoder
        logits = decoder.logits

        def refusing(pieces: Any) -> torch.Tensor:
            if sum(piece.end - piece.begin for piece in pieces) > tokens:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return logits(pieces)

        monkeypatch.setattr(decoder, "logits", refusing)


def test_a_step_that_does_not_fit_is_tried_again_in_half(
    llama: LoadedModel, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [prompt(index, f"prompt {index}" * 3, ignore_eos=True) for index in range(6)]
    wanted = said(answers(make(llama), *requests))
    engine = make(llama, step_tokens=64)
    Small(engine, 10, monkeypatch)
    assert said(answers(engine, *requests)) == wanted
    assert engine.capacity.found is not None
    assert engine.capacity.found <= 10


def test_a_request_that_does_not_fit_alone_is_an_error_and_the_next_one_is_answered(
    llama: LoadedModel, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make(llama)
    with monkeypatch.context() as full:
        Small(engine, 0, full)
        [failed] = answers(engine, prompt(0, "x"))
    assert error(failed)[0] == "out_of_memory"
    assert answers(engine, prompt(1, "x"))[0].error is None


def test_a_request_for_whose_sampling_is_no_memory_is_an_error_beside_others_that_go_on(
    llama: LoadedModel, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has two rows, which enter in the same step as the others; the engine serves its like again later."""
    others = [prompt(index, f"prompt {index}" * 3) for index in range(3)]
    greedy = prompt(3, "greedy", n=2, presence_penalty=0.5)
    engine = make(llama)
    wanted = said(answers(make(llama), *others, greedy))
    with monkeypatch.context() as full:
        full.setattr(Penalties, "_make_room", no_memory)
        *fine, failed = answers(engine, *others, greedy)
    assert error(failed)[0] == "out_of_memory"
    assert said(fine) == wanted[:3]
    assert said(answers(engine, *others, greedy)) == wanted


def no_memory(*_: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_all_rows_can_have_the_whole_context_at_once(llama: LoadedModel, make: Make) -> None:
    engine = make(llama, rows=4, step_tokens=1_024)
    for index in range(4):
        engine.add(key(index), prompt(index, "abcd"[index] * 199, max_tokens=CONTEXT_TOKENS - 200, ignore_eos=True))
    outputs = []
    while engine.active or not outputs:
        outputs += engine.step()
        assert engine.waiting == 0
    assert [each.completion_tokens for each in outputs] == [CONTEXT_TOKENS - 200] * 4


def test_a_broken_device_is_no_lack_of_memory(llama: LoadedModel, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Any) -> torch.Tensor:
        raise RuntimeError("CUDA error: device-side assert triggered")

    engine = make(llama)
    monkeypatch.setattr(engine._decoder, "logits", broken)
    with pytest.raises(RuntimeError, match="device-side"):
        answers(engine, prompt(0, "x"))


_SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_ROPE = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0, "original_max_position_embeddings": 64}
UNSUPPORTED: dict[str, tuple[Callable[[], PreTrainedConfig], str]] = {
    "state space": (
        lambda: MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2),
        "0 of its 2 layers",
    ),
    "attention of its own": (
        lambda: BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4),
        "0 of its",
    ),
    "convolutions": (
        lambda: Lfm2Config(**_SIZES, num_key_value_heads=2, layer_types=["conv", "full_attention"]),
        "1 of its 2 layers",
    ),
    "chunked attention": (
        lambda: Llama4TextConfig(
            **_SIZES,
            num_key_value_heads=2,
            head_dim=8,
            intermediate_size=32,
            intermediate_size_mlp=32,
            num_local_experts=2,
        ),
        "chunked_attention",
    ),
    "stretched positions": (
        lambda: LlamaConfig(
            **_SIZES, intermediate_size=32, max_position_embeddings=CONTEXT_TOKENS, rope_parameters=_ROPE
        ),
        "longest row",
    ),
}


@pytest.fixture(scope="module", params=UNSUPPORTED)
def unsupported(request: pytest.FixtureRequest) -> tuple[LoadedModel, str]:
    config, reason = UNSUPPORTED[request.param]
    return loaded(config()), reason


def test_a_model_that_it_cannot_serve_is_served_by_generate(unsupported: tuple[LoadedModel, str]) -> None:
    model, reason = unsupported
    with pytest.raises(Unsupported, match=reason):
        ContinuousEngine(model, options=EngineOptions())
    engine = serve(model, options=EngineOptions())
    assert isinstance(engine, GenerateEngine)
    engine.add(key(0), prompt(0, "x", max_tokens=3, ignore_eos=True))
    [output] = engine.step()
    assert output.completion_tokens == 3


@pytest.mark.parametrize("quantization", [Quantization(Kind.NF4), Quantization(Kind.FP4), Quantization(Kind.NONE)])
def test_deterministic_answers_are_the_same_alone_and_in_company_bit_for_bit(quantization: Quantization) -> None:
    model = load(ModelSpec(DEMO, quantization=quantization), "cpu")
    texts = ["What is 3 plus 4?", "Name a", "x" * 70, "Count to ten: 1, 2, 3,", "Why"]
    requests = [
        prompt(index, text, logprobs=True, top_logprobs=5, max_tokens=12 + 5 * index, ignore_eos=True)
        for index, text in enumerate(texts)
    ]

    def run(*some: GenerationRequest) -> list[Output]:
        options = EngineOptions(max_rows=4, deterministic=True)
        with closing(ContinuousEngine(model, options=options)) as engine:
            return answers(engine, *some)

    together = run(*requests)
    assert [each.payload for each in together] == [run(request)[0].payload for request in requests]


def test_int8_is_refused_where_answers_have_to_be_deterministic() -> None:
    model = load(ModelSpec(DEMO, quantization=Quantization(Kind.INT8)), "cpu")
    with pytest.raises(Unsupported, match="outlier"):
        ContinuousEngine(model, options=EngineOptions(deterministic=True))
