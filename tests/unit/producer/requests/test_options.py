"""Sampling options on lines and as flags of a job: every option, its limits, and the field that keeps it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchmill.jobs.configuration.settings import Settings, load_settings
from batchmill.jobs.errors import UsageError
from batchmill.jobs.requests.generation import GenerationOptions, GenerationRequest, SamplingParams
from batchmill.jobs.store.store import Store
from batchmill.producer.cli.submit import _submission, submit
from batchmill.producer.requests.checks import BadLine
from batchmill.producer.requests.kinds import FORMS
from batchmill.producer.requests.lines import Lines
from batchmill.producer.submission import Submission
from batchmill.producer.submit import load_job
from tests.support.store import mill

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
PROMPT: dict[str, Any] = {"prompt": "SECRET"}
MESSAGES: dict[str, Any] = {"messages": [{"role": "user", "content": "SECRET"}]}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
OF_SCHEMA = {"type": "json_schema", "schema": SCHEMA}
OF_REGEX, OF_CHOICE = {"type": "regex", "regex": "[ab]+"}, {"type": "choice", "choice": ["yes", "no"]}
JSON_OBJECT = {"type": "json_object"}


def read(line: dict[str, Any]) -> GenerationRequest:
    return Lines(FORMS.values()).request(line, 0, adapter_of=lambda _model, adapter: adapter)


def asked(line: dict[str, Any]) -> SamplingParams:
    return read(line).sampling


def openai(body: dict[str, Any], url: str = CHAT) -> dict[str, Any]:
    return {"custom_id": "a", "method": "POST", "url": url, "body": body}


def forms(options: dict[str, Any]) -> list[dict[str, Any]]:
    """A line of every form that asks for these options."""
    return [
        PROMPT | options,
        MESSAGES | options,
        openai(MESSAGES | options),
        openai(PROMPT | options, COMPLETIONS),
    ]


# --- what is taken ------------------------------------------------------------------------------------------

#: Options of a line of any form, and the sampling parameters that are kept.
GOOD: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"min_tokens": 0}, {"min_tokens": 0}),
    ({"min_tokens": 5, "max_tokens": 5}, {"min_tokens": 5, "max_tokens": 5}),
    ({"min_tokens": 5, "max_completion_tokens": 6}, {"min_tokens": 5, "max_tokens": 6}),
    ({"presence_penalty": -2}, {"presence_penalty": -2.0}),
    ({"presence_penalty": 0}, {"presence_penalty": 0.0}),
    ({"frequency_penalty": 2.0}, {"frequency_penalty": 2.0}),
    ({"logit_bias": {"50256": -100, "0": 1.5}}, {"logit_bias": ((50256, -100.0), (0, 1.5))}),
    ({"logit_bias": {str(2**31 - 1): 100}}, {"logit_bias": ((2**31 - 1, 100.0),)}),
    ({"logit_bias": {str(each): 1 for each in range(1024)}}, {"logit_bias": tuple((i, 1.0) for i in range(1024))}),
    ({"logit_bias": {}}, {}),
    ({"stop_token_ids": [0, 2]}, {"stop_token_ids": (0, 2)}),
    ({"stop_token_ids": []}, {}),
    ({"ignore_eos": True}, {"ignore_eos": True}),
    ({"ignore_eos": False}, {"ignore_eos": False}),
    ({"n": 1}, {"n": 1}),
    ({"n": 128, "temperature": 0}, {"n": 128, "temperature": 0.0}),
    ({"n": 3, "best_of": 3}, {"n": 3}),
    ({"best_of": 1}, {}),
    ({"echo": False}, {}),
    ({"logprobs": False}, {"logprobs": False}),
    ({"logprobs": True}, {"logprobs": True}),
    ({"logprobs": True, "top_logprobs": 20}, {"logprobs": True, "top_logprobs": 20}),
    ({"logprobs": True, "top_logprobs": 0}, {"logprobs": True, "top_logprobs": 0}),
    ({"logprobs": False, "top_logprobs": 0}, {"logprobs": False}),
    ({"top_logprobs": 0}, {}),
    ({"response_format": {"type": "text"}}, {}),
    ({"response_format": JSON_OBJECT}, {"response_format": JSON_OBJECT}),
    ({"response_format": OF_SCHEMA}, {"response_format": OF_SCHEMA}),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "X", "strict": True, "schema": SCHEMA}}},
        {"response_format": OF_SCHEMA},
    ),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}, "schema": None}},
     {"response_format": {"type": "json_schema", "schema": {}}}),
    ({"response_format": OF_REGEX}, {"response_format": OF_REGEX}),
    ({"response_format": {"type": "regex", "pattern": "[ab]+"}}, {"response_format": OF_REGEX}),
    ({"response_format": OF_CHOICE}, {"response_format": OF_CHOICE}),
    ({"guided_json": SCHEMA}, {"response_format": OF_SCHEMA}),
    ({"guided_regex": "[ab]+"}, {"response_format": OF_REGEX}),
    ({"guided_choice": ["yes", "no"]}, {"response_format": OF_CHOICE}),
    ({"structured_outputs": {"json": SCHEMA, "regex": None}}, {"response_format": OF_SCHEMA}),
    ({"structured_outputs": {"regex": "[ab]+"}}, {"response_format": OF_REGEX}),
    ({"structured_outputs": {"choice": ["yes", "no"]}}, {"response_format": OF_CHOICE}),
    ({"structured_outputs": {"json_object": True}}, {"response_format": JSON_OBJECT}),
    ({"structured_outputs": {"json_object": False}}, {}),
    ({"structured_outputs": {}}, {}),
    ({"response_format": OF_SCHEMA, "guided_json": SCHEMA}, {"response_format": OF_SCHEMA}),
    ({"response_format": {"type": "text"}, "guided_regex": "[ab]+"}, {"response_format": OF_REGEX}),
]  # fmt: skip


@pytest.mark.parametrize(("options", "kept"), GOOD, ids=[json.dumps(each)[:80] for each, _ in GOOD])
def test_an_option_is_taken_in_every_form_of_line(options: dict[str, Any], kept: dict[str, Any]) -> None:
    for line in forms(options):
        assert asked(line) == SamplingParams(**kept)


@pytest.mark.parametrize("key", ["min_tokens", "n", "best_of", "echo", "guided_json", "structured_outputs"])
def test_a_null_asks_for_nothing(key: str) -> None:
    for line in forms({key: None}):
        assert asked(line) == SamplingParams()


def test_a_prompt_may_ask_for_logprobs_by_their_number() -> None:
    for line in (PROMPT, openai(PROMPT, COMPLETIONS)):
        for count in (0, 5, 20):
            body = {"logprobs": count}
            asks = line | body if "prompt" in line else openai(PROMPT | body, COMPLETIONS)
            assert asked(asks) == SamplingParams(logprobs=True, top_logprobs=count)
    assert asked(PROMPT | {"logprobs": 5, "top_logprobs": 5}) == SamplingParams(logprobs=True, top_logprobs=5)


def test_biases_and_penalties_are_floats_and_keep_the_order_of_the_line() -> None:
    sampling = asked(PROMPT | {"logit_bias": {"9": 1, "3": 2}, "presence_penalty": 1})
    assert repr(sampling.logit_bias) == "((9, 1.0), (3, 2.0))"
    assert repr(sampling.presence_penalty) == "1.0"


# --- what is refused ----------------------------------------------------------------------------------------


def of_format(**keys: Any) -> dict[str, Any]:
    return MESSAGES | {"response_format": keys}


#: A line, and what is said of it.
BAD: list[tuple[dict[str, Any], str]] = [
    *((PROMPT | {"min_tokens": each}, "min_tokens must be an integer from 0 to 2147483647, not ")
      for each in (-1, 2**31, 1.0, True, "1")),
    (PROMPT | {"min_tokens": 6, "max_tokens": 5}, "min_tokens is 6, which is more than max_tokens, 5"),
    (PROMPT | {"min_tokens": 6, "max_completion_tokens": 5}, "min_tokens is 6, which is more than max_tokens, 5"),
    *((PROMPT | {"presence_penalty": each}, "presence_penalty must be a number from -2 to 2, not ")
      for each in (-2.1, 3, True, "1")),
    (PROMPT | {"frequency_penalty": 2.01}, "frequency_penalty must be a number from -2 to 2, not 2.01"),
    (PROMPT | {"logit_bias": [["5", 1]]}, "logit_bias must be an object of at most 1024 token ids, not a list"),
    (PROMPT | {"logit_bias": dict.fromkeys(map(str, range(1025)), 1)},
     "logit_bias must be an object of at most 1024 token ids, not one of 1025"),
    *((PROMPT | {"logit_bias": {each: 1}}, f"token ids as keys, as in {{\"50256\": -100}}, not {each!r}")
      for each in ("", "-1", "05", "1.0", " 1", "\u0661", "the", str(2**31))),
    *((PROMPT | {"logit_bias": {"7": each}}, "logit_bias[7] must be a number from -100 to 100, not ")
      for each in (100.5, -101, True, "1", None)),
    (PROMPT | {"stop_token_ids": 5}, "stop_token_ids must be a list of at most 1024 token ids, not a number"),
    (PROMPT | {"stop_token_ids": [1] * 1025}, "stop_token_ids must be a list of at most 1024 token ids, not a list of"),
    *((PROMPT | {"stop_token_ids": [1, each]}, "stop_token_ids[1] must be an integer from 0 to 2147483647, not ")
      for each in (-1, 1.0, "5", None, True)),
    *((PROMPT | {"ignore_eos": each}, "ignore_eos must be a boolean, not ") for each in (1, "true", {})),
    *((PROMPT | {"n": each}, "n must be an integer from 1 to 128, not ") for each in (0, 129, True, 2.0, "2")),
    (PROMPT | {"best_of": 3}, "best_of must equal n, which is 1, not 3"),
    (PROMPT | {"n": 2, "best_of": 3}, "best_of must equal n, which is 2, not 3"),
    (PROMPT | {"n": 2, "best_of": 1}, "best_of must equal n, which is 2, not 1"),
    (PROMPT | {"best_of": True}, "best_of must be an integer from 1 to 128, not true"),
    (PROMPT | {"echo": True}, "echo is not supported as true; remove it or write false"),
    # logprobs
    *((MESSAGES | {"logprobs": each}, "logprobs must be a boolean, not ") for each in (0, 5, "true")),
    (openai(MESSAGES | {"logprobs": 5}), "body.logprobs must be a boolean, not a number"),
    *((PROMPT | {"logprobs": each}, "logprobs must be true, false or an integer from 0 to 20, not ")
      for each in (-1, 21, 1.0, "5", [])),
    *((MESSAGES | {"logprobs": True, "top_logprobs": each}, "top_logprobs must be an integer from 0 to 20, not ")
      for each in (-1, 21, True, 1.0)),
    (MESSAGES | {"top_logprobs": 5}, "top_logprobs needs logprobs to be true"),
    (MESSAGES | {"top_logprobs": 5, "logprobs": False}, "top_logprobs needs logprobs to be true"),
    (PROMPT | {"top_logprobs": 5, "logprobs": 4}, "top_logprobs and logprobs differ; give one of them"),
    # response_format
    (MESSAGES | {"response_format": "json_object"}, "response_format must be an object, not a string"),
    (of_format(), "response_format.type is missing or null; it is one of text, json_object, json_schema, regex, ch"),
    (of_format(type=None, schema={}), "response_format.type is missing or null"),
    (of_format(type="xml"), "type must be one of text, json_object, json_schema, regex, choice; it is 'xml'"),
    (of_format(type=["text"]), "response_format.type must be one of text"),
    (of_format(type="text", schema={}), "response_format.'schema' is not supported here; remove it"),
    (of_format(type="json_object", schema={}), "response_format.'schema' is not supported here; remove it"),
    (of_format(type="json_schema"), "response_format.json_schema is missing or null"),
    (of_format(type="json_schema", schema="{}"), "response_format.schema must be an object, not a string"),
    (of_format(type="json_schema", json_schema=5), "response_format.json_schema must be an object, not a number"),
    (of_format(type="json_schema", json_schema={"name": "SECRET"}), "response_format.json_schema.schema is missing"),
    (of_format(type="json_schema", json_schema={"schema": {}, "strict": 1}), "json_schema.strict must be a boolean"),
    (of_format(type="json_schema", json_schema={"schema": {}, "colour": 1}), "json_schema.'colour' is not supported"),
    (of_format(type="json_schema", json_schema={"schema": {}}, schema={}), "schema and json_schema exclude each other"),
    (of_format(type="regex"), "response_format.regex is missing or null"),
    (of_format(type="regex", regex=""), "response_format.regex must be a string that is not empty"),
    (of_format(type="regex", pattern=["SECRET"]), "pattern must be a string that is not empty, not a list"),
    (of_format(type="regex", regex="a", pattern="a"), "response_format.pattern and regex exclude each other"),
    (of_format(type="choice"), "response_format.choice is missing or null"),
    *((of_format(type="choice", choice=each), "response_format.choice must be a list of 1 to 1024 strings")
      for each in ([], "SECRET", {}, ["a"] * 1025)),
    (of_format(type="choice", choice=["SECRET", 5]), "choice[1] must be a string that is not empty, not a number"),
    (of_format(type="choice", choice=["SECRET", ""]), "choice[1] must be a string that is not empty"),
    # vLLM's spellings
    (PROMPT | {"guided_json": "{}"}, "guided_json must be an object, not a string"),
    (PROMPT | {"guided_regex": ""}, "guided_regex must be a string that is not empty"),
    (PROMPT | {"guided_choice": "SECRET"}, "guided_choice must be a list of 1 to 1024 strings"),
    (PROMPT | {"guided_grammar": "SECRET"}, "'guided_grammar' is not supported here; remove it"),
    (PROMPT | {"structured_outputs": []}, "structured_outputs must be an object, not a list"),
    (PROMPT | {"structured_outputs": {"grammar": "SECRET"}}, "structured_outputs.'grammar' is not supported here"),
    (PROMPT | {"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs.regex and json exclude each oth"),
    (PROMPT | {"structured_outputs": {"json_object": 1}}, "structured_outputs.json_object must be a boolean"),
    (PROMPT | {"guided_json": {}, "guided_regex": "a"}, "guided_regex and guided_json contradict each other; give one"),
    (of_format(type="json_object") | {"guided_json": {}}, "guided_json and response_format contradict each other"),
    (of_format(type="regex", regex="a") | {"structured_outputs": {"regex": "b"}}, "structured_outputs and response_fo"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "said"), BAD, ids=[f"{place}-{said[:60]}" for place, (_, said) in enumerate(BAD)])
def test_an_option_that_cannot_be_is_refused_by_name_and_shows_no_prompt(line: dict[str, Any], said: str) -> None:
    with pytest.raises(BadLine) as refused:
        read(line)
    text = str(refused.value)
    assert said in text
    assert "SECRET" not in text
    assert len(text) < 200


# --- whatever is asked for arrives --------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
FILLED = TEXT.filter(bool)
IDS = st.integers(0, 2**31 - 1)
ANY_SCHEMA = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda child: st.lists(child, max_size=3) | st.dictionaries(TEXT, child, max_size=3),
    max_leaves=8,
)
FORMATS = st.one_of(
    st.just(JSON_OBJECT),
    st.dictionaries(TEXT, ANY_SCHEMA, max_size=4).map(lambda schema: {"type": "json_schema", "schema": schema}),
    FILLED.map(lambda regex: {"type": "regex", "regex": regex}),
    st.lists(FILLED, min_size=1, max_size=4).map(lambda choice: {"type": "choice", "choice": choice}),
)
BIASES = st.dictionaries(IDS, st.floats(-100, 100), min_size=1, max_size=5).map(lambda each: tuple(each.items()))
ASKED = {
    "max_tokens": st.integers(10, 2**31 - 1),
    "min_tokens": st.integers(0, 10),
    "temperature": st.floats(0, 100),
    "top_p": st.floats(0, 1),
    "top_k": st.integers(1, 2**31 - 1),
    "min_p": st.floats(0, 1),
    "repetition_penalty": st.floats(0, 100, exclude_min=True),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "logit_bias": BIASES,
    "stop": st.lists(FILLED, min_size=1, max_size=4).map(tuple),
    "stop_token_ids": st.lists(IDS, min_size=1, max_size=4).map(tuple),
    "ignore_eos": st.booleans(),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "n": st.integers(1, 128),
    "logprobs": st.just(True),
    "response_format": FORMATS,
}
SAMPLING = st.fixed_dictionaries({}, optional=ASKED).map(lambda values: SamplingParams(**values))
TEMPLATE = st.none() | st.dictionaries(TEXT, ANY_SCHEMA, min_size=1, max_size=3)


def fuzz(examples: int) -> Callable[[Any], Any]:
    return settings(max_examples=examples, suppress_health_check=[HealthCheck.function_scoped_fixture])


def test_the_fuzz_knows_every_option() -> None:
    assert {*ASKED, "top_logprobs"} == set(SamplingParams.__dataclass_fields__)


@given(sampling=SAMPLING, template=TEMPLATE, ascii_only=st.booleans())
@fuzz(100)
def test_what_is_asked_for_survives_its_json(
    sampling: SamplingParams, template: dict[str, Any] | None, ascii_only: bool
) -> None:
    request = GenerationRequest(0, "request-0", messages=({"role": "user", "content": "x"},), sampling=sampling)
    assert GenerationRequest.from_body(0, "request-0", request.to_body()) == request
    options = GenerationOptions("s", sampling, template)
    assert GenerationOptions.from_json(json.loads(json.dumps(options.to_json()))) == options
    line = {"prompt": "x"} | sampling.to_json()
    assert asked(json.loads(json.dumps(line, ensure_ascii=ascii_only))) == sampling
    assert SamplingParams().over(sampling) == sampling.over(SamplingParams()) == sampling


@given(sampling=st.lists(SAMPLING, min_size=1, max_size=4), flags=SAMPLING, template=TEMPLATE)
@fuzz(15)
def test_a_worker_claims_what_was_asked_for(
    store: Store,
    tmp_path: Path,
    sampling: list[SamplingParams],
    flags: SamplingParams,
    template: dict[str, Any] | None,
) -> None:
    path = tmp_path / "p.jsonl"
    message = {"role": "user", "content": "x"}
    path.write_text("".join(json.dumps({"messages": [message]} | each.to_json()) + "\n" for each in sampling))
    options = GenerationOptions(None, flags, template)
    job_id, spec = load_job(Submission(str(path), "echo", options=options), store=store, settings=load_settings())
    (claimed,) = mill.claim(store, mill.session(store, spec=spec, only_job=job_id))
    model = SamplingParams(top_k=7).over(SamplingParams.fallback())
    assert [each.sampling for each in claimed.requests] == [each.over(flags).over(model) for each in sampling]
    assert [each.chat_template_kwargs for each in claimed.requests] == [template] * len(sampling)
    store.closing.cancel(job_id)


def test_a_lines_template_variables_win_over_the_jobs() -> None:
    own = GenerationRequest(0, "a", messages=({"role": "user", "content": "x"},), chat_template_kwargs={"a": 1})
    options = GenerationOptions(chat_template_kwargs={"a": 2, "b": 3})
    assert own.under(options).chat_template_kwargs == {"a": 1, "b": 3}


# --- the flags ----------------------------------------------------------------------------------------------


def submission(*flags: str) -> Submission:
    """The submission that `submit` parses from its command line."""
    context = submit.make_context("submit", ["p.jsonl", "-m", "echo", *flags])
    return _submission(context.params, Settings())


FLAGS: list[tuple[list[str], dict[str, Any]]] = [
    (["--min-p", "0.1"], {"min_p": 0.1}),
    (["--repetition-penalty", "1.1"], {"repetition_penalty": 1.1}),
    (["--presence-penalty", "-2"], {"presence_penalty": -2.0}),
    (["--frequency-penalty", "0.5"], {"frequency_penalty": 0.5}),
    (["--min-tokens", "5", "--max-tokens", "5"], {"min_tokens": 5, "max_tokens": 5}),
    (["--n", "4"], {"n": 4}),
    (["--ignore-eos"], {"ignore_eos": True}),
    (["--stop", "a", "--stop", "b"], {"stop": ["a", "b"]}),
    (["--response-format", "json_object"], {"response_format": JSON_OBJECT}),
    (["--response-format", "text"], {}),
    (["--response-format", json.dumps(OF_SCHEMA)], {"response_format": OF_SCHEMA}),
    (["--chat-template-kwargs", '{"enable_thinking": false}'], {"chat_template_kwargs": {"enable_thinking": False}}),
    (["--chat-template-kwargs", "{}"], {}),
]


@pytest.mark.parametrize(("flags", "options"), FLAGS, ids=[" ".join(each) for each, _ in FLAGS])
def test_a_flag_is_an_option_of_the_job(flags: list[str], options: dict[str, Any]) -> None:
    assert submission(*flags).options.to_json() == options


BAD_FLAGS: list[tuple[list[str], str]] = [
    (["--min-p", "1.5"], "--min-p must be a number from 0 to 1, not 1.5"),
    (["--min-p", "nan"], "--min-p must be a number from 0 to 1, not nan"),
    (["--repetition-penalty", "0"], "--repetition-penalty must be a number above 0 and at most 100, not 0.0"),
    (["--presence-penalty", "3"], "--presence-penalty must be a number from -2 to 2, not 3.0"),
    (["--frequency-penalty", "inf"], "--frequency-penalty must be a number from -2 to 2, not inf"),
    (["--min-tokens", "-1"], "--min-tokens must be an integer from 0 to"),
    (["--min-tokens", "6", "--max-tokens", "5"], "--min-tokens is 6, which is more than max_tokens, 5"),
    (["--n", "0"], "--n must be an integer from 1 to 128, not 0"),
    (["--n", "two"], "'two' is not a valid integer"),
    (["--stop", ""], "--stop must be a string or a list of at most 16 strings, none of them empty"),
    (
        ["--response-format", "jsn"],
        "--response-format type must be one of text, json_object, json_schema, regex, choice",
    ),
    (["--response-format", "{"], "--response-format not JSON: Expecting property name"),
    (["--response-format", '{"type":"regex"}'], "--response-format regex is missing or null"),
    (["--chat-template-kwargs", "[]"], "--chat-template-kwargs must be an object, not a list"),
    (["--chat-template-kwargs", "{a}"], "--chat-template-kwargs not JSON: Expecting property name"),
    (["--chat-template-kwargs", '{"a":1,"a":2}'], "--chat-template-kwargs has the key 'a' twice in one object"),
]


@pytest.mark.parametrize(("flags", "said"), BAD_FLAGS, ids=[" ".join(each) for each, _ in BAD_FLAGS])
def test_a_flag_that_cannot_be_is_refused_by_name(flags: list[str], said: str) -> None:
    with pytest.raises((UsageError, click.UsageError)) as refused:
        submission(*flags)
    assert said in str(refused.value)


def test_once_tells_jobs_apart_by_every_flag() -> None:
    asking = [flags for flags, options in FLAGS if options]
    fingerprints = [submission("--once", *flags).fingerprint(mill.ECHO_SPEC, "0" * 64) for flags in ([], *asking)]
    assert len(set(fingerprints)) == 1 + len(asking)


def test_the_order_of_keys_makes_no_other_job() -> None:
    one, other = (
        GenerationOptions(chat_template_kwargs={"a": 1, "b": 2}),
        GenerationOptions(chat_template_kwargs={"b": 2, "a": 1}),
    )
    asked_for = [Submission("p.jsonl", "echo", options=each) for each in (one, other)]
    assert len({each.fingerprint(mill.ECHO_SPEC, "0" * 64) for each in asked_for}) == 1
