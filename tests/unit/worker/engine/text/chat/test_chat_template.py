"""Chat templates: every message, call and tool reaches the model as the template wants it, or is refused."""

from __future__ import annotations

import re
from typing import Any

import pytest

from batchmill.jobs.requests.generation import GenerationRequest, SamplingParams
from batchmill.jobs.requests.request import ErrorCode
from batchmill.worker.engine.refused import Refused
from batchmill.worker.engine.text.chat.chat_template import KEPT_SHAPES, ChatTemplate
from batchmill.worker.engine.text.tokenization import Tokenization
from tests.support.models.tiny import build_tokenizer

#: Qwen's: it writes four roles and leaves out every other.
QWEN = """\
{%- if messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}
{%- if (message.role == 'user') or (message.role == 'system' and not loop.first) %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- elif message.role == 'assistant' %}{{- '<|im_start|>assistant\\n' + message.content + '<|im_end|>\\n' }}
{%- elif message.role == 'tool' %}
    {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
#: It knows contents as lists of parts alone, as those of models that see do.
PARTS = """\
{%- for message in messages %}[{{ message.role }}]
{%- for part in message.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"""
#: It writes what it is given of everything; arguments by a filter of choice, and a null content if it is not empty.
TOOLS = """\
{%- if tools %}{{ tools | tojson }}{% endif %}
{%- for message in messages %}[{{ message.role }}]{{ message.name }}:{{ message.content CONTENT }}
{%- for call in message.tool_calls %}{{ call.function.name }}({{ call.function.arguments FILTER }}){% endfor %}
{%- endfor %}"""
LAST = "{{ messages[-1].role }}{{ messages[-1].content }}"
PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
CALLS = PLAIN.replace("{% endfor %}", "{% for c in m.tool_calls %}{{ c.function.name }}{% endfor %}{% endfor %}")
USER = {"role": "user", "content": "hi"}
CALL = {"id": "c1", "type": "function", "function": {"name": "w", "arguments": '{"city": "Bonn"}'}}
CALLING = {"role": "assistant", "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "sunny"}
#: A result of no call, and a call without arguments.
UNASKED = {"role": "tool", "content": "sunny"}
BARE = {**CALL, "function": {"name": "w", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def asking(*messages: dict[str, Any], **more: Any) -> GenerationRequest:
    return GenerationRequest(0, "0", messages=messages, sampling=SamplingParams(max_tokens=1, temperature=0.0), **more)


def tokens(template: str, *messages: dict[str, Any]) -> int:
    """The number of tokens of the prompt, one for each byte."""
    tokenizer = build_tokenizer(chat_template=template)
    held = Tokenization(tokenizer, vocabulary=260, context_tokens=None, end_token_ids=[1])
    return len(held.prompt(asking(*messages)).tokens)


def written(template: str, *messages: dict[str, Any], **more: Any) -> str:
    return ChatTemplate(build_tokenizer(chat_template=template)).rendered(asking(*messages, **more))


def refusal(template: str, *messages: dict[str, Any], **more: Any) -> str:
    with pytest.raises(Refused) as caught:
        written(template, *messages, **more)
    assert caught.value.code == ErrorCode.CHAT_TEMPLATE_ERROR
    return str(caught.value)


def test_a_developers_message_is_the_systems_where_the_template_does_not_know_it() -> None:
    told = {"content": "Say BANANA"}
    assert tokens(QWEN, USER) == 52
    assert tokens(QWEN, {"role": "system", **told}, USER) == 92
    assert tokens(QWEN, {"role": "developer", **told}, USER) == 92
    assert tokens(QWEN, USER, {"role": "developer", **told}, USER) > 92
    assert "[developer]Say BANANA" in written("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}",
        {"role": "developer", **told})  # fmt: skip


def test_a_message_that_a_template_leaves_out_is_refused_with_its_role_and_place() -> None:
    secret = {"role": "function", "content": "SECRET"}
    said = "the chat template leaves out messages[{}], of role 'function': the model would never see it"
    assert refusal(QWEN, secret, USER) == said.format(0)
    assert refusal(QWEN, USER, secret) == said.format(1)
    assert "messages[0], of role 'user'" in refusal(LAST, USER, USER)
    assert written(LAST, USER) == "userhi"
    assert written(LAST, {"role": "system", "content": ""}, USER) == "userhi", "there was nothing to leave out"


def test_a_template_may_want_contents_as_lists_of_parts() -> None:
    assert written(PARTS, {"role": "system", "content": "be brief"}, USER) == "[system]be brief[user]hi"


def test_what_a_template_does_to_a_text_is_its_right() -> None:
    stripped = "{% for m in messages %}[{{ m.content | trim | tojson }}]{% endfor %}"
    assert written(stripped, {"role": "user", "content": ' say "x"\n'}) == '["say \\"x\\""]'


@pytest.mark.parametrize(
    ("content", "arguments", "said"),
    [
        ("", "| tojson", '{"city": "Bonn"}'),
        ("", "+ ''", '{"city": "Bonn"}'),
        ("", "", '{"city": "Bonn"}'),
        ("+ ''", "| tojson", '{"city": "Bonn"}'),
    ],
)
def test_calls_and_results_of_tools_are_written_as_the_template_wants_them(
    content: str, arguments: str, said: str
) -> None:
    template = TOOLS.replace("CONTENT", content).replace("FILTER", arguments)
    assert written(template, USER, CALLING, RESULT) == f"[user]:hi[assistant]:w({said})[tool]w:sunny"
    assert written(template, USER, tools=(TOOL,)).startswith('[{"type": "function", "function": {"name": "weather"')


def test_ids_of_calls_are_shortened_where_the_template_takes_no_others() -> None:
    strict = TOOLS.replace("CONTENT", "").replace("FILTER", "| tojson")
    strict += """{% for m in messages %}
    {%- for id in [m.tool_call_id] + m.tool_calls | default([]) | map(attribute='id') | list %}
    {%- if id is defined %}{% if id | length != 9 %}{{ raise_exception('no') }}{% endif %}<{{ id }}>{% endif %}
    {%- endfor %}{% endfor %}"""
    found = written(strict, USER, CALLING, RESULT).partition("<")[2].removesuffix(">").split("><")
    assert len(found) == 2
    assert found[0] == found[1] != "c1"


def test_arguments_that_are_no_object_stay_as_they_are() -> None:
    template = TOOLS.replace("CONTENT", "").replace("FILTER", "")
    broken = {**CALL, "function": {"name": "w", "arguments": '{"city": '}}
    empty = {**CALL, "function": {"name": "w", "arguments": ""}}
    assert 'w({"city": )w()' in written(template, {"role": "assistant", "tool_calls": [broken, empty]})


def test_a_call_or_a_tool_that_a_template_leaves_out_is_refused() -> None:
    assert "leaves out messages[1].tool_calls[0], of role 'assistant'" in refusal(PLAIN, USER, CALLING, RESULT)
    assert "leaves out tools[0]" in refusal(PLAIN, USER, tools=(TOOL,))
    named = (
        "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls %}{{ c.function.name }}{% endfor %}{% endfor %}"
    )
    assert "the arguments of messages[1].tool_calls[0]" in refusal(named, USER, CALLING)


def test_a_template_keeps_its_own_words_about_what_it_refuses() -> None:
    short = "{% for m in messages %}{% if m.content | length > 9 %}{{ raise_exception('too long') }}{% endif %}" \
        "{{ m.content }}{% endfor %}"  # fmt: skip
    assert (
        refusal(short, {"role": "user", "content": "SECRET SECRET"})
        == "the chat template refused the messages: too long"
    )


@pytest.mark.parametrize(
    ("template", "good", "other", "left_out"),
    [
        (QWEN, [USER], [{**USER, "role": "function"}], "messages[0], of role 'function'"),
        (LAST, [{**USER, "content": ""}, USER], [USER, USER], "messages[0], of role 'user'"),
        (PLAIN, [{**USER, "tool_calls": []}], [{**USER, "tool_calls": [CALL]}], "messages[0].tool_calls[0]"),
        (CALLS, [{**USER, "tool_calls": [BARE]}], [{**USER, "tool_calls": [CALL]}], "the arguments of messages[0]"),
        (PLAIN.replace("in messages", "in messages if not m.name"), [USER], [{**USER, "name": "bob"}], "messages[0]"),
        (PLAIN.replace("in messages", "in messages if not m.tool_call_id"), [UNASKED], [RESULT], "messages[0]"),
    ],
    ids=["role", "content", "calls", "arguments", "name", "tool_call_id"],
)
def test_a_conversation_that_differs_in_one_part_is_proven_anew(
    template: str, good: list[dict[str, Any]], other: list[dict[str, Any]], left_out: str
) -> None:
    known = ChatTemplate(build_tokenizer(chat_template=template))
    known.rendered(asking(*good))
    with pytest.raises(Refused, match=re.escape(f"leaves out {left_out}")):
        known.rendered(asking(*other))


def test_a_conversation_with_tools_is_proven_anew() -> None:
    known = ChatTemplate(build_tokenizer(chat_template=PLAIN))
    known.rendered(asking(USER))
    with pytest.raises(Refused, match=re.escape("leaves out tools[0]")):
        known.rendered(asking(USER, tools=(TOOL,)))


def test_a_request_with_tools_needs_no_name_where_a_template_is_for_them() -> None:
    templates = {"rag": PLAIN, "tool_use": PLAIN + "{{ tools | tojson }}"}
    several = ChatTemplate(build_tokenizer(chat_template=templates))  # type: ignore[arg-type]
    assert "weather" in several.rendered(asking(USER, tools=(TOOL,)))
    with pytest.raises(Refused, match="the chat templates rag, tool_use, and the request does not say which"):
        several.rendered(asking(USER))


def test_shapes_are_proven_once_and_few_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = build_tokenizer(chat_template=QWEN)
    template, rendered = ChatTemplate(tokenizer), []
    apply = tokenizer.apply_chat_template
    monkeypatch.setattr(tokenizer, "apply_chat_template", lambda *a, **k: rendered.append(1) or apply(*a, **k))
    for number in range(5):
        template.rendered(asking(USER, {"role": "assistant", "content": str(number)}, USER))
    assert len(rendered) == 6
    for number in range(1, KEPT_SHAPES + 9):
        template.rendered(asking(USER, chat_template_kwargs={"number": number}))
    assert len(template._kept) == KEPT_SHAPES
