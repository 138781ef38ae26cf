"""A model's chat template: the messages of a request become the text of its prompt, and none of them is lost.

A template silently leaves out things that it does not know: a role, a list of tools, a call. So each shape of
conversation is written once with marks in the place of its texts, in one form after the other, until every mark is in
the prompt; the form that held is remembered. A template may change a text itself, for instance strip it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from batchmill.jobs.requests.generation import GenerationRequest
from batchmill.jobs.requests.request import ErrorCode
from batchmill.worker.engine.refused import Refused
from batchmill.worker.engine.text.chat.form import MessageForm, forms
from batchmill.worker.engine.text.chat.marks import Marked, shape_of

#: Arguments of `apply_chat_template` that are no variables of a template, and that a request may not set.
RESERVED = frozenset(
    {
        "conversation",
        "tools",
        "chat_template",
        "tokenize",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
    }
)
#: A template's refusal is kept up to this length.
REFUSAL_LENGTH = 200
#: Shapes of conversations that are remembered, with their forms or refusals.
KEPT_SHAPES = 1_024


class ChatTemplate:
    """The chat template of one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._kept: OrderedDict[tuple[Any, ...], MessageForm | str] = OrderedDict()

    def rendered(self, request: GenerationRequest) -> str:
        """Renders the prompt of a request that has messages. Raises Refused."""
        if not self._tokenizer.chat_template:
            raise Refused(
                ErrorCode.NO_CHAT_TEMPLATE, "the model has no chat template: send prompts instead of messages"
            )
        variables = {"add_generation_prompt": True, **(request.chat_template_kwargs or {})}
        named = self._refuse_unnamed(variables.get("chat_template"), tools=bool(request.tools))
        if reserved := sorted(RESERVED - named & variables.keys()):
            raise _refused(f"chat_template_kwargs may not set {', '.join(reserved)}: remove it")
        messages, tools = request.messages or (), request.tools or ()
        form = self._form(messages, tools, variables)
        try:
            return self._apply(form.write(messages), tools, variables)
        except TemplateError as error:
            raise _refused(f"the chat template refused the messages: {self._own_words(error)}") from error
        except Exception as error:
            # A template runs a request's values through operators and filters, which raise anything.
            raise _refused(f"the chat template failed: {type(error).__name__}") from error

    def _refuse_unnamed(self, name: Any, *, tools: bool) -> frozenset[str]:
        """The names of RESERVED that may be set: a template's name, where the model has several. Raises Refused.

        Without a name transformers takes `tool_use` for a request with tools, or else `default`.
        """
        templates = self._tokenizer.chat_template
        if not isinstance(templates, dict):
            return frozenset()
        taken = name is None and ("default" in templates or (tools and "tool_use" in templates))
        if not taken and not (isinstance(name, str) and name in templates):
            raise _refused(
                f"the model has the chat templates {', '.join(sorted(templates))}, and the request does not say which: "
                f'choose one by --chat-template-kwargs \'{{"chat_template": "{min(templates)}"}}\', or by '
                "chat_template_kwargs in its line"
            )
        return frozenset({"chat_template"})

    def _form(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]
    ) -> MessageForm:
        """Finds the form in which all of such a conversation is in the prompt. Raises Refused."""
        shape = shape_of(messages, tools, variables)
        form = self._kept.pop(shape, None) or self._proven(Marked(messages, tools), variables)
        self._kept[shape] = form
        if len(self._kept) > KEPT_SHAPES:
            self._kept.popitem(last=False)
        if isinstance(form, str):
            raise _refused(form)
        return form

    def _proven(self, marked: Marked, variables: Mapping[str, Any]) -> MessageForm | str:
        """Returns the first form that leaves no mark out, or the reason why there is none."""
        lost = refused = failed = None
        for form in forms(marked.messages):
            try:
                written = self._apply(form.write(marked.messages), marked.tools, variables)
            except TemplateError as error:
                refused = refused or f"the chat template refused the messages: {str(error)[:REFUSAL_LENGTH]}"
            except Exception as error:
                failed = failed or f"the chat template failed: {type(error).__name__}"
            else:
                missing = marked.missing(written)
                if missing is None and not marked.garbled(written):
                    return form
                lost = lost or f"the chat template leaves out {missing or 'the JSON of the arguments of a tool call'}"
        reason = lost or refused or failed
        assert reason is not None, "there is one form at least"
        return f"{lost}: the model would never see it" if lost else reason

    def _own_words(self, error: TemplateError) -> str:
        """The template's own message, with nothing of the prompt in it."""
        message = str(error)
        own = message in str(self._tokenizer.chat_template)
        return message[:REFUSAL_LENGTH] if own else "it depends on what they say"

    def _apply(
        self, messages: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]
    ) -> str:
        written: str = self._tokenizer.apply_chat_template(
            messages, tools=[dict(each) for each in tools] or None, tokenize=False, **variables
        )
        return written


def _refused(what: str) -> Refused:
    return Refused(ErrorCode.CHAT_TEMPLATE_ERROR, what)
