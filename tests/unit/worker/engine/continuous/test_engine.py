"""The continuous engine: every option, formats, cancelled rows, timings and deterministic answers."""

from __future__ import annotations

import json
from contextlib import closing
from threading import Event
from typing import Any

import pytest
import torch

from batchmill.jobs.models.quantization import Kind, Quantization
from batchmill.jobs.models.spec import DEMO, ModelSpec
from batchmill.jobs.requests.generation import GenerationRequest
from batchmill.jobs.requests.request import Output
from batchmill.worker.engine.continuous.engine import ContinuousEngine
from batchmill.worker.engine.grammar.grammars import Grammars, Matcher
from batchmill.worker.engine.options import EngineOptions
from batchmill.worker.models.load import LoadedModel, load
from tests.support.models.continuous import Make, answers, error, key, prompt, said
from tests.support.models.families import CONTEXT_TOKENS, VOCABULARY


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
