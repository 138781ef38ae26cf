"""Calls of tools within answers: texts that hold some, and their form in both kinds of lines."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from tokenizers import AddedToken

from batchmill.jobs.requests.generation import GENERATION, Choice, GenerationRequest, SamplingParams
from batchmill.jobs.requests.request import Output, RequestKey
from batchmill.jobs.store.leases.lease import BatchReport
from batchmill.jobs.store.store import Store
from batchmill.producer.files.export import export
from batchmill.worker.engine.text.decoding import Decoding
from batchmill.worker.engine.text.tokenization import Tokenization
from tests.support.models.tiny import build_tokenizer
from tests.support.store import mill
from tests.unit.worker.engine.text.chat.test_chat_template import TOOL, USER

WRITES = "{{ tools | tojson }}{% for m in messages %}{{ m.content }}{% endfor %}"
HERMES = WRITES + "within <tool_call></tool_call>"
MISTRAL = WRITES + "{# [TOOL_CALLS] #}"
LLAMA = WRITES + '{"name": function name, "parameters": dictionary of argument name and its value}.'
CALLED = {"name": "weather", "arguments": {"city": "Köln", "days": 3}}
JSON = json.dumps(CALLED, ensure_ascii=False)
PLAIN = json.dumps({"name": "weather", "parameters": CALLED["arguments"]})


def said(template: str, text: str, *, stop: tuple[str, ...] = (), calls_tools: bool = True, most: int = 0) -> Choice:
    """The choice of an answer of this text, in which the marks of calls are special tokens."""
    tokenizer = build_tokenizer(chat_template=template)
    marks = ("[TOOL_CALLS]", "[ARGS]", "<|python_tag|>")
    tokenizer.add_tokens([AddedToken(each, special=True) for each in marks], special_tokens=True)
    held = Tokenization(tokenizer, vocabulary=300, context_tokens=None, end_token_ids=[1])
    sampling = SamplingParams(max_tokens=1, temperature=0.0, stop=stop)
    prompt = held.prompt(GenerationRequest(0, "0", None, (USER,), sampling, tools=(TOOL,), calls_tools=calls_tools))
    tokens = tokenizer.encode(text, add_special_tokens=False)
    return held.choice(prompt, tokens[:most] if most else [*tokens, 1], named="job/0/0")


def functions(choice: Choice) -> list[Any]:
    calls = choice.tool_calls or ()
    assert all(re.fullmatch("[0-9a-f]{9}", call["id"]) and call["type"] == "function" for call in calls)
    assert len({call["id"] for call in calls}) == len(calls)
    return [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls]


@pytest.mark.parametrize(
    ("template", "text", "count", "content"),
    [
        (HERMES, f"<tool_call>\n{JSON}\n</tool_call>", 1, None),
        (HERMES, f"Let me see. <tool_call>{JSON}</tool_call>\n<tool_call>{JSON}</tool_call> ", 2, "Let me see."),
        (MISTRAL, f"[TOOL_CALLS] [{JSON}, {JSON}]", 2, None),
        (MISTRAL, "So: [TOOL_CALLS]weather[ARGS]" + json.dumps(CALLED["arguments"]), 1, "So:"),
        (LLAMA, PLAIN, 1, None),
        (LLAMA, f"<|python_tag|>{PLAIN}; {PLAIN}", 2, None),
    ],
)
def test_calls_are_found_as_the_models_template_has_them(
    template: str, text: str, count: int, content: str | None
) -> None:
    choice = said(template, text)
    assert functions(choice) == [("weather", CALLED["arguments"])] * count
    assert (choice.content, choice.finish_reason) == (content, "stop")
    assert choice.text == re.sub(r"\[TOOL_CALLS\]|\[ARGS\]|<\|python_tag\|>", "", text), "as any answer is written"
    assert said(template, text) == choice
    assert said(template, text, calls_tools=False).tool_calls is None


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (HERMES, "sunny"),
        (HERMES, JSON),
        (HERMES, f"<tool_call>{JSON}"),
        (HERMES, f"<tool_call>{JSON}</tool_call><tool_call>{{</tool_call>"),
        (HERMES, f"<tool_call>{JSON} {JSON}</tool_call>"),
        (HERMES, "<tool_call>" + JSON.replace("3", "NaN") + "</tool_call>"),
        (HERMES, "<tool_call>" + JSON.replace("3", "1e999") + "</tool_call>"),
        (HERMES, "<tool_call>" + JSON.replace("Köln", "\\ud83d") + "</tool_call>"),
        (HERMES, '<tool_call>{"name": "weather", "arguments": "sunny"}</tool_call>'),
        (HERMES, '<tool_call>{"arguments": {}}</tool_call>'),
        (HERMES, "<tool_call>" + "[" * 100_000 + "</tool_call>"),
        (MISTRAL, f"[TOOL_CALLS] [{JSON}] sunny"),
        (MISTRAL, f"[TOOL_CALLS] [{JSON[:-1]}"),
        (LLAMA, PLAIN.replace("weather", "other")),
        (LLAMA, f"{PLAIN} is what I would call"),
        (LLAMA, '{"a": 1}'),
        (WRITES, f"<tool_call>{JSON}</tool_call>"),
    ],
)
def test_what_is_no_well_formed_call_stays_text(template: str, text: str) -> None:
    choice = said(template, text)
    assert (choice.tool_calls, choice.content) == (None, None)


def test_a_call_that_is_cut_off_stays_text_and_one_before_a_stop_string_is_found() -> None:
    text = f"<tool_call>{JSON}</tool_call>"
    assert said(HERMES, text, most=20).tool_calls is None
    assert said(HERMES, text, most=20).finish_reason == "length"
    assert functions(said(HERMES, f"{text}END more", stop=("END",))) == [("weather", CALLED["arguments"])]


def test_special_tokens_are_kept_by_name_where_they_are_asked_for() -> None:
    tokenizer = build_tokenizer()
    tokens = tokenizer.encode("a<|end|>é<pad>b", add_special_tokens=False)
    assert Decoding(tokenizer).text_with({3}, tokens) == "a<|end|>éb"


def test_both_kinds_of_lines_have_the_calls(sqlite_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store(sqlite_url)
    call = {"id": "a1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    calling = Choice("x <call>", "stop", None, [call], "x")
    choices = (calling, Choice("<call>", "length", None, [call]), Choice("y", "stop"))
    job_id = mill.begin(store, batch_size=4)
    store.creation.add(job_id, prompts=[GenerationRequest(0, "a", None, (USER,))], batch_size=4, lease_seconds=60)
    store.creation.open(job_id, spec=mill.ECHO_SPEC, file_sha256="", fingerprint="", lease_seconds=60)
    who = mill.session(store)
    (claimed,) = mill.claim(store, who)
    output = Output(RequestKey(job_id, 0), choices, 3, 5)
    assert Output.from_json(json.loads(json.dumps(output.to_json())), GENERATION) == output
    mill.save(store, who, [BatchReport(claimed.lease, outputs=[output])])
    for form in ("jsonl", "openai"):
        export(store, store.jobs.job(job_id), out=None, form=form, only="all")
    own, openai = map(json.loads, capsys.readouterr().out.splitlines())
    assert (own["text"], own["finish_reason"], own["tool_calls"]) == ("x <call>", "stop", [call])
    assert own["choices"][1:] == [
        {"text": "<call>", "finish_reason": "length", "tool_calls": [call]},
        {"text": "y", "finish_reason": "stop"},
    ]
    first, second, third = openai["response"]["body"]["choices"]
    called = {"role": "assistant", "refusal": None, "tool_calls": [call]}
    assert (first["message"], first["finish_reason"]) == (called | {"content": "x"}, "tool_calls")
    assert (second["message"], second["finish_reason"]) == (called | {"content": None}, "length")
    assert (third["message"]["content"], "tool_calls" in third["message"]) == ("y", False)
