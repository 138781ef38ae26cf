"""Random bytes and random JSON: each is read, and then can be stored, or is refused."""

from __future__ import annotations

import io
import json
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchmill.jobs.errors import PromptFileError
from batchmill.jobs.requests.generation import GenerationRequest
from batchmill.producer.files.prompt_file import PromptFile
from tests.support.prompt_files import CHAT, COMPLETIONS, HELLO, openai

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
ANY_TEXT = st.text(max_size=20) | st.sampled_from([CHAT, COMPLETIONS, "POST", "user", "text", "\0", "\ud800"])
ANY_SCALAR = st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT
LIKELY_KEYS: dict[str, st.SearchStrategy[Any]] = {
    "max_tokens": st.integers(1, 9),
    "temperature": st.floats(0, 2) | st.integers(0, 100),
    "top_k": st.integers(-1, 99),
    "stop": TEXT | st.lists(TEXT.filter(bool), max_size=16),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "metadata": st.dictionaries(TEXT, st.floats(allow_nan=False, allow_infinity=False) | st.none() | TEXT),
    "user": TEXT,
    "min_tokens": st.integers(0, 9),
    "n": st.integers(1, 128),
    "logprobs": st.booleans(),
    "presence_penalty": st.floats(-2, 2),
    "logit_bias": st.dictionaries(st.integers(0, 99).map(str), st.floats(-100, 100)),
    "stop_token_ids": st.lists(st.integers(0, 99)),
    "guided_choice": st.lists(TEXT),
    "response_format": st.fixed_dictionaries(
        {"type": st.sampled_from(["text", "json_object", "json_schema", "regex"])},
        optional={"schema": st.dictionaries(TEXT, TEXT), "regex": TEXT},
    ),
}
KEYS = [
    "custom_id", "method", "url", "body", "messages", "prompt", "model", "role", "content", "type", "text",
    "chat_template_kwargs", "stream", "tools", "top_logprobs", "best_of", "structured_outputs", "other", *LIKELY_KEYS,
]  # fmt: skip
ANY_KEY = st.sampled_from(KEYS)
ANY_JSON = st.recursive(
    ANY_SCALAR, lambda child: st.lists(child) | st.dictionaries(ANY_KEY, child, max_size=5), max_leaves=20
)
ANY_OBJECT = st.dictionaries(ANY_KEY, ANY_JSON, max_size=2)
MORE = ANY_OBJECT | st.fixed_dictionaries({}, optional=LIKELY_KEYS)
ANY_LINE = st.one_of(
    ANY_OBJECT,
    MORE.map(lambda more: {"prompt": "a"} | more),
    MORE.map(lambda more: {"messages": [HELLO]} | more),
    MORE.map(lambda more: {"messages": [HELLO | more]}),
    MORE.map(lambda more: openai({"messages": [HELLO]} | more)),
    MORE.map(lambda more: openai({"prompt": "a"}, COMPLETIONS) | more),
)


def read_bytes(data: bytes, name: str) -> list[GenerationRequest] | None:
    """The requests of these bytes, or None where they are refused."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        prompts = PromptFile("-", form="text" if name.endswith(".txt") else None)
        try:
            prompts_read = [line.request for line in prompts]
            prompts.raise_if_bad()
            return prompts_read
        except PromptFileError:
            return None


def assert_storable(found: list[GenerationRequest] | None) -> None:
    for request in found or ():
        body = request.to_body()
        assert "\\u0000" not in body.replace("\\\\", "")
        assert GenerationRequest.from_body(request.index, request.custom_id, body) == request
        assert (request.custom_id + body).encode()


@given(data=st.binary(max_size=300), name=st.sampled_from(["a.jsonl", "a.txt"]))
@settings(max_examples=300)
def test_any_bytes_are_read_or_refused(data: bytes, name: str) -> None:
    assert_storable(read_bytes(data, name))


@given(line=ANY_LINE, ascii_only=st.booleans())
@settings(max_examples=500)
def test_any_json_is_read_or_refused(line: dict[str, Any], ascii_only: bool) -> None:
    text = json.dumps(line, ensure_ascii=ascii_only)
    assert_storable(read_bytes(text.encode("utf-8", "surrogatepass"), "a.jsonl"))


@given(data=st.data())
@settings(max_examples=200)
def test_a_good_file_cut_or_changed_anywhere_is_read_or_refused(data: st.DataObject) -> None:
    body = {"messages": [HELLO], "stop": ["a"], "top_p": 0.5, "metadata": {"a": 1}}
    whole = json.dumps(openai(body)).encode()
    begin = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.integers(begin, len(whole)))
    assert_storable(read_bytes(whole[:begin] + data.draw(st.binary(max_size=5)) + whole[end:], "a.jsonl"))


LINE_END = st.sampled_from(["\n", "\r\n"])


@given(texts=st.lists(TEXT, min_size=1, max_size=8), ascii_only=st.booleans(), end=LINE_END)
@settings(max_examples=200)
def test_texts_come_back_exactly(texts: list[str], ascii_only: bool, end: str) -> None:
    lines: list[dict[str, Any]] = [{"prompt": text} for text in texts]
    lines += [{"messages": [{"role": "user", "content": text}]} for text in texts]
    data = end.join(json.dumps(line, ensure_ascii=ascii_only) for line in lines).encode()
    prompts = read_bytes(data, "a.jsonl")
    assert prompts is not None
    assert [each.prompt for each in prompts[: len(texts)]] == texts
    assert [each.messages[0]["content"] for each in prompts[len(texts) :] if each.messages] == texts
    assert_storable(prompts)
