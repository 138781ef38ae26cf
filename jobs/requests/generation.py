"""The values that travel between modules: SamplingParams, Request, Output and what they are made of.

Everything here is frozen and changed by copy. Nothing here knows SQL, Redis, files or tensors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from enum import StrEnum
from typing import Any, NamedTuple

from batchmill.jobs.requests.states import RequestState

#: A request's custom_id has 1 to this many characters.
CUSTOM_ID_LENGTH = 256
DEFAULT_BATCH_SIZE = 64
#: A line of a prompt file has at most so many bytes where the settings say nothing else.
DEFAULT_LINE_BYTES = 16 * 1024**2
#: The settings may say at most this: longer texts do not go into every database.
MAX_LINE_BYTES = 256 * 1024**2
#: About what one logprob takes in the store.
_LOGPROB_BYTES = 80
#: A batch is closed or retried within one transaction of at most half a second, so it is bounded.
MAX_BATCH_SIZE = 5_000


class ErrorCode(StrEnum):
    """The codes of error outputs."""

    CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
    EMPTY_PROMPT = "empty_prompt"
    UNKNOWN_TOKEN = "unknown_token"
    NO_CHAT_TEMPLATE = "no_chat_template"
    CHAT_TEMPLATE_ERROR = "chat_template_error"
    INVALID_RESPONSE_FORMAT = "invalid_response_format"
    UNSUPPORTED_OPTION = "unsupported_option"  #: by batchmill, or by the model of the job
    UNSUPPORTED_BY_WORKER = "unsupported_by_worker"  #: its engine or its adapters; another one may answer it
    OUT_OF_MEMORY = "out_of_memory"
    NOT_A_NUMBER = "not_a_number"
    ENGINE_ERROR = "engine_error"
    POISON = "poison"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """What a request asks of the sampler; None asks for nothing, and the next level decides.

    The levels: the request's own line, then the job's flags, then the model's generation_config, then
    temperature 1.0 and max_tokens 256 (`SamplingParams.fallback()`).

    `logit_bias`: pairs of a token id and what is added to its logit. `n`: choices of one output. `top_logprobs`:
    how many alternatives each token of `logprobs` lists. `response_format`: `{"type": "json_object"}`, `{"type":
    "json_schema", "schema": ...}`, `{"type": "regex", "regex": ...}` or `{"type": "choice", "choice": [...]}`.
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
    logit_bias: tuple[tuple[int, float], ...] | None = None
    stop: tuple[str, ...] | None = None
    stop_token_ids: tuple[int, ...] | None = None
    ignore_eos: bool | None = None
    seed: int | None = None
    n: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: Mapping[str, Any] | None = None

    @classmethod
    def fallback(cls) -> SamplingParams:
        """What holds where neither the request, nor the job, nor the model says anything."""
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
        """The keys that were asked for, ready for json; `logit_bias` as an object by token id."""
        values = ((name, getattr(self, name)) for name in _SAMPLING_NAMES)
        asked = {name: list(v) if isinstance(v, tuple) else v for name, v in values if v is not None}
        if self.logit_bias is not None:
            asked["logit_bias"] = {str(token): bias for token, bias in self.logit_bias}
        return asked

    def over(self, lower: SamplingParams) -> SamplingParams:
        """These parameters, filled up from a lower level."""
        mine = {name: getattr(self, name) for name in _SAMPLING_NAMES if getattr(self, name) is not None}
        return replace(lower, **mine) if mine else lower


_SAMPLING_NAMES = tuple(each.name for each in fields(SamplingParams))
#: Shared by every request that asks for nothing of its own.
NO_SAMPLING = SamplingParams()


class RequestKey(NamedTuple):
    """What names a request everywhere: its job and its place in the file, from 0."""

    job_id: str
    index: int  # type: ignore[assignment]  # the word for a place in the file, not tuple.index


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt with its sampling parameters: either `prompt` or `messages` is set, never both.

    `passthrough` holds what is kept and returned without effect (user, metadata, store, service_tier). `adapter`: the
    name of the one that answers it, None for the model alone. `tools`: those that the model is told of, as OpenAI
    writes them; `calls_tools`: whether its answer may call them.
    """

    index: int
    custom_id: str
    prompt: str | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    sampling: SamplingParams = NO_SAMPLING
    chat_template_kwargs: Mapping[str, Any] | None = None
    passthrough: Mapping[str, Any] | None = None
    adapter: str | None = None
    tools: tuple[Mapping[str, Any], ...] | None = None
    calls_tools: bool = True

    def to_body(self) -> str:
        """The JSON text that the store keeps: everything but index and custom_id."""
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
        return _to_json(body)

    @classmethod
    def from_body(cls, index: int, custom_id: str, body: str) -> Request:
        """The inverse of `to_body`; an unknown key is refused."""
        values = json.loads(body)
        if "sampling" in values:
            values["sampling"] = SamplingParams.from_json(values["sampling"])
        if "messages" in values:
            values["messages"] = tuple(values["messages"])
        if "tools" in values:
            values["tools"] = tuple(values["tools"])
        return cls(index, custom_id, **values)

    def under(self, options: JobOptions) -> Request:
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


#: NUL and half a surrogate pair: a template's own words, say, may hold them.
_UNSTORABLE = re.compile(r"[\0\ud800-\udfff]")
_to_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


@dataclass(frozen=True, slots=True)
class JobOptions:
    """What a job's flags ask for all of its requests. `adapters`: the names that a request may name, sorted."""

    system: str | None = None
    sampling: SamplingParams = NO_SAMPLING
    chat_template_kwargs: Mapping[str, Any] | None = None
    adapters: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """`{"system", "chat_template_kwargs", "adapters", sampling keys ...}` without what was not asked for."""
        own = {name: getattr(self, name) for name in _OWN_OPTIONS}
        own["adapters"] = list(self.adapters) or None
        return {key: each for key, each in own.items() if each is not None} | self.sampling.to_json()

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> JobOptions:
        """The inverse of `to_json`; an unknown key is refused."""
        sampling = SamplingParams.from_json({key: each for key, each in value.items() if key not in _OWN_OPTIONS})
        adapters = tuple(value.get("adapters", ()))
        return cls(value.get("system"), sampling, value.get("chat_template_kwargs"), adapters)


#: What a job's flags ask for besides the sampling.
_OWN_OPTIONS = ("system", "chat_template_kwargs", "adapters")


@dataclass(frozen=True, slots=True)
class Choice:
    """One answer to a request; `finish_reason` is `stop` or `length`.

    `logprobs`, where asked for, is OpenAI's object: `{"content": [{"token", "logprob", "bytes", "top_logprobs"}]}`.
    `tool_calls` are those in the text, as OpenAI writes them, and `content` is what the text says besides.
    """

    text: str
    finish_reason: str
    logprobs: Mapping[str, Any] | None = None
    tool_calls: Sequence[Mapping[str, Any]] | None = None
    content: str | None = None

    @property
    def logprob_count(self) -> int:
        """Of all its tokens, with their alternatives."""
        content = () if self.logprobs is None else self.logprobs["content"]
        return sum(1 + len(each["top_logprobs"]) for each in content)

    def to_json(self) -> dict[str, Any]:
        """Ready for json; `logprobs` and `tool_calls` only where there are some."""
        logprobs = {} if self.logprobs is None else {"logprobs": self.logprobs}
        calls = {} if self.tool_calls is None else {"tool_calls": self.tool_calls, "content": self.content}
        return {"text": self.text, "finish_reason": self.finish_reason} | logprobs | calls


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds that one request waited in the engine, that its prompt took, and that its answer took."""

    queued_seconds: float
    prefill_seconds: float
    decode_seconds: float


@dataclass(frozen=True, slots=True)
class OutputError:
    """Why a request has no answer: a code of ErrorCode, and a sentence for the user."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Output:
    """What came back for one request: choices, token counts and timings, or an error.

    `timings` is None where the engine answers a whole micro-batch at once. `completion_tokens`: of all choices.
    """

    key: RequestKey
    choices: tuple[Choice, ...] = ()
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: OutputError | None = None
    timings: Timings | None = None

    @property
    def state(self) -> RequestState:
        if self.error is None:
            return RequestState.SUCCEEDED
        cancelled = self.error.code == ErrorCode.CANCELLED
        return RequestState.CANCELLED if cancelled else RequestState.FAILED

    @property
    def size_bytes(self) -> int:
        """About what its choices take in the store, told without writing them down."""
        return sum(len(each.text) + _LOGPROB_BYTES * each.logprob_count for each in self.choices)

    def choices_json(self) -> str:
        """The choices as the store keeps them."""
        return _to_json([choice.to_json() for choice in self.choices])

    def to_json(self) -> dict[str, Any]:
        """Everything, ready for json."""
        return asdict(self) | {"key": list(self.key)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Output:
        """The inverse of `to_json`, also of what was written before outputs had timings."""
        error, timings = value["error"], value.get("timings")
        return cls(
            RequestKey(*value["key"]),
            tuple(Choice(**each) for each in value["choices"]),
            value["prompt_tokens"],
            value["completion_tokens"],
            None if error is None else OutputError(**error),
            None if timings is None else Timings(**timings),
        )

    @classmethod
    def failed(cls, key: RequestKey, code: ErrorCode, message: str, *, prompt_tokens: int = 0) -> Output:
        """The error output of one request; what no database can hold of its message is replaced by U+FFFD."""
        told = _UNSTORABLE.sub("\ufffd", message)
        return cls(key, prompt_tokens=prompt_tokens, error=OutputError(code.value, told))


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a job came from: its file, the command line, and the versions that it was submitted with."""

    file_name: str
    file_sha256: str
    command: str
    versions: Mapping[str, str] = field(default_factory=dict)
