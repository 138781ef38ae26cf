"""Generation, the kind of request that is answered with text: its requests, options and choices.

Everything here is frozen and changed by copy. Nothing here knows SQL, Redis, files or tensors.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, cast

from batchmill.jobs.requests.request import FIRST_KIND, Output, RequestKind, to_text

#: The approximate size of one logprob in the store.
_LOGPROB_BYTES = 80


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """The options of a request for the sampler; None leaves one to the next level.

    The levels: the request's own line, then the job's flags, then the model's generation_config, then
    temperature 1.0 and max_tokens 256 (`SamplingParams.fallback()`).
    """

    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    #: Pairs of a token id and the number that is added to its logit.
    logit_bias: tuple[tuple[int, float], ...] | None = None
    stop: tuple[str, ...] | None = None
    stop_token_ids: tuple[int, ...] | None = None
    ignore_eos: bool | None = None
    seed: int | None = None
    #: Choices of one output.
    n: int | None = None
    logprobs: bool | None = None
    #: The number of alternatives that each token of `logprobs` lists.
    top_logprobs: int | None = None
    #: `{"type": "json_object"}`, `{"type": "json_schema", "schema": ...}`, `{"type": "regex", "regex": ...}` or
    #: `{"type": "choice", "choice": [...]}`.
    response_format: Mapping[str, Any] | None = None

    @classmethod
    def fallback(cls) -> SamplingParams:
        """The values where neither the request, nor the job, nor the model says anything."""
        return cls(max_tokens=256, temperature=1.0)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> SamplingParams:
        """The inverse of `to_json`; an unknown key is refused."""
        values = dict(value)
        for name in ("stop", "stop_token_ids"):
            if values.get(name) is not None:
                values[name] = tuple(values[name])
        if values.get("logit_bias") is not None:
            values["logit_bias"] = tuple((int(token), bias) for token, bias in values["logit_bias"].items())
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        """The options that are set, ready for json; `logit_bias` as an object by token id."""
        values = ((name, getattr(self, name)) for name in _SAMPLING_NAMES)
        options = {name: list(v) if isinstance(v, tuple) else v for name, v in values if v is not None}
        if self.logit_bias is not None:
            options["logit_bias"] = {str(token): bias for token, bias in self.logit_bias}
        return options

    def over(self, lower: SamplingParams) -> SamplingParams:
        """These parameters, filled up from a lower level."""
        mine = {name: getattr(self, name) for name in _SAMPLING_NAMES if getattr(self, name) is not None}
        return replace(lower, **mine) if mine else lower


_SAMPLING_NAMES = tuple(each.name for each in fields(SamplingParams))
#: Shared by every request that asks for nothing of its own.
NO_SAMPLING = SamplingParams()


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt with its sampling parameters: either `prompt` or `messages` is set, never both."""

    kind: ClassVar[str] = FIRST_KIND

    index: int
    custom_id: str
    prompt: str | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    sampling: SamplingParams = NO_SAMPLING
    chat_template_kwargs: Mapping[str, Any] | None = None
    #: Values that are kept and returned without effect: user, metadata, store, service_tier.
    passthrough: Mapping[str, Any] | None = None
    #: The name of the adapter that answers it, None for the model alone.
    adapter: str | None = None
    #: The tools that the model is told of, as OpenAI writes them.
    tools: tuple[Mapping[str, Any], ...] | None = None
    #: True where its answer may call the tools.
    calls_tools: bool = True

    def to_body(self) -> str:
        """The JSON text that the store keeps: everything but kind, index and custom_id."""
        body: dict[str, Any] = {}
        if self.prompt is not None:
            body["prompt"] = self.prompt
        if self.messages is not None:
            body["messages"] = self.messages
        if self.sampling is not NO_SAMPLING:
            body["sampling"] = self.sampling.to_json()
        if self.chat_template_kwargs:
            body["chat_template_kwargs"] = self.chat_template_kwargs
        if self.passthrough:
            body["passthrough"] = self.passthrough
        if self.adapter is not None:
            body["adapter"] = self.adapter
        if self.tools is not None:
            body["tools"] = self.tools
        if not self.calls_tools:
            body["calls_tools"] = False
        return to_text(body)

    @classmethod
    def from_body(cls, index: int, custom_id: str, body: str) -> GenerationRequest:
        """The inverse of `to_body`; an unknown key is refused."""
        values = json.loads(body)
        if "sampling" in values:
            values["sampling"] = SamplingParams.from_json(values["sampling"])
        if "messages" in values:
            values["messages"] = tuple(values["messages"])
        if "tools" in values:
            values["tools"] = tuple(values["tools"])
        return cls(index, custom_id, **values)

    def under(self, options: GenerationOptions) -> GenerationRequest:
        """This request as its job wants it run: sampling and chat_template_kwargs filled up, the job's system message
        in front.

        With a system message of the job, a plain prompt becomes the user's message of a chat.
        """
        request = replace(self, sampling=self.sampling.over(options.sampling))
        if options.chat_template_kwargs:
            own = self.chat_template_kwargs or {}
            request = replace(request, chat_template_kwargs={**options.chat_template_kwargs, **own})
        if options.system is None:
            return request
        messages = self.messages or ({"role": "user", "content": self.prompt},)
        if messages[0].get("role") not in ("system", "developer"):
            messages = ({"role": "system", "content": options.system}, *messages)
        return replace(request, prompt=None, messages=messages)


@dataclass(frozen=True, slots=True)
class GenerationOptions:
    """The options that a job's flags give to all of its requests."""

    system: str | None = None
    sampling: SamplingParams = NO_SAMPLING
    chat_template_kwargs: Mapping[str, Any] | None = None
    #: The names of adapters that a request may name, sorted.
    adapters: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """`{"system", "chat_template_kwargs", "adapters", sampling keys ...}` without the options that are not set."""
        own = {name: getattr(self, name) for name in _OWN_OPTIONS}
        own["adapters"] = list(self.adapters) or None
        return {key: each for key, each in own.items() if each is not None} | self.sampling.to_json()

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> GenerationOptions:
        """The inverse of `to_json`; an unknown key is refused."""
        sampling = SamplingParams.from_json({key: each for key, each in value.items() if key not in _OWN_OPTIONS})
        adapters = tuple(value.get("adapters", ()))
        return cls(value.get("system"), sampling, value.get("chat_template_kwargs"), adapters)

    def settled(self) -> dict[str, Any]:
        """The sampling alone, which is filled up from the model's defaults; the rest holds as the flags give it."""
        return self.sampling.to_json()

    @classmethod
    def filled(
        cls, asked: Mapping[str, Any], settled: Mapping[str, Any] | None, defaults: SamplingParams | None
    ) -> GenerationOptions:
        """The options of a job's requests: those settled, or else those asked for, over the model's defaults."""
        options = cls.from_json(asked)
        if settled is not None:
            return replace(options, sampling=SamplingParams.from_json(settled))
        return replace(options, sampling=options.sampling.over(defaults or NO_SAMPLING).over(SamplingParams.fallback()))


#: The options of a job's flags besides the sampling.
_OWN_OPTIONS = ("system", "chat_template_kwargs", "adapters")


@dataclass(frozen=True, slots=True)
class Choice:
    """One answer to a request."""

    text: str
    #: `stop` or `length`.
    finish_reason: str
    #: OpenAI's object, where asked for: `{"content": [{"token", "logprob", "bytes", "top_logprobs"}]}`.
    logprobs: Mapping[str, Any] | None = None
    #: The tool calls in the text, as OpenAI writes them.
    tool_calls: Sequence[Mapping[str, Any]] | None = None
    #: The text besides the tool calls.
    content: str | None = None

    @property
    def logprob_count(self) -> int:
        """The number of logprobs of all its tokens, alternatives included."""
        content = () if self.logprobs is None else self.logprobs["content"]
        return sum(1 + len(each["top_logprobs"]) for each in content)

    @property
    def size_bytes(self) -> int:
        """The approximate size in the store, computed without encoding it."""
        return len(self.text) + _LOGPROB_BYTES * self.logprob_count

    def to_json(self) -> dict[str, Any]:
        """Ready for json; `logprobs` and `tool_calls` only where there are some."""
        logprobs = {} if self.logprobs is None else {"logprobs": self.logprobs}
        calls = {} if self.tool_calls is None else {"tool_calls": self.tool_calls, "content": self.content}
        return {"text": self.text, "finish_reason": self.finish_reason} | logprobs | calls


def choices_of(output: Output) -> tuple[Choice, ...]:
    """The parts of an output of this kind."""
    return cast("tuple[Choice, ...]", output.payload)


def _request(index: int, custom_id: str, body: str, options: GenerationOptions) -> GenerationRequest:
    return GenerationRequest.from_body(index, custom_id, body).under(options)


def _part(value: Mapping[str, Any]) -> Choice:
    return Choice(**value)


def _finish_reasons(output: Output) -> Iterator[str]:
    return (each.finish_reason for each in choices_of(output))


GENERATION = RequestKind(GenerationRequest.kind, _request, GenerationOptions.filled, _part, _finish_reasons)
