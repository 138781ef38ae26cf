"""Values that requests of every kind share: what names one, what comes back for it, and the value that is a kind.

Everything here is frozen and changed by copy. Nothing here knows SQL, Redis, files or tensors, nor any one kind.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from batchmill.jobs.requests.states import RequestState

#: The one kind that there was before revision 0012 of the store: what names none is of it.
FIRST_KIND = "generation"
#: A request's custom_id has 1 to this many characters.
CUSTOM_ID_LENGTH = 256
DEFAULT_BATCH_SIZE = 64
#: A line of a prompt file has at most so many bytes where the settings say nothing else.
DEFAULT_LINE_BYTES = 16 * 1024**2
#: The settings may say at most this: longer texts do not go into every database.
MAX_LINE_BYTES = 256 * 1024**2
#: A batch is closed or retried within one transaction of at most half a second, so it is bounded.
MAX_BATCH_SIZE = 5_000

#: NUL and half a surrogate pair: a template's own words, say, may hold them.
_UNSTORABLE = re.compile(r"[\0\ud800-\udfff]")
#: The JSON text that the store keeps of bodies and payloads.
to_text = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


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


class RequestKey(NamedTuple):
    """What names a request everywhere: its job and its place in the file, from 0."""

    job_id: str
    index: int  # type: ignore[assignment]  # the word for a place in the file, not tuple.index


class Request(Protocol):
    """One request of any kind. `adapter`: the name of the one that answers it, None for the model alone."""

    @property
    def kind(self) -> str: ...

    @property
    def index(self) -> int: ...

    @property
    def custom_id(self) -> str: ...

    @property
    def adapter(self) -> str | None: ...

    def to_body(self) -> str:
        """The JSON text that the store keeps: everything but kind, index and custom_id."""


class JobOptions(Protocol):
    """What a job's flags ask for all of its requests. `adapters`: the names that a request may name, sorted."""

    @property
    def adapters(self) -> tuple[str, ...]: ...

    def to_json(self) -> dict[str, Any]:
        """The options asked for, ready for json; empty where there are none."""

    def settled(self) -> dict[str, Any]:
        """The options that the first worker of a job writes down, so that they hold for all of its requests."""


class OutputPart(Protocol):
    """One part of what a request is answered with: a choice of a generation."""

    @property
    def size_bytes(self) -> int:
        """About what it takes in the store, told without writing it down."""

    def to_json(self) -> dict[str, Any]:
        """Ready for json."""


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
    """The answer to one request: the parts of its kind, token counts and timings, or an error.

    `timings` is None where the engine answers a whole micro-batch at once. `completion_tokens`: of all parts.
    """

    key: RequestKey
    payload: tuple[OutputPart, ...] = ()
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
        """About what its payload takes in the store, told without writing it down."""
        return sum(each.size_bytes for each in self.payload)

    def payload_text(self) -> str:
        """The payload as the store keeps it."""
        return to_text([each.to_json() for each in self.payload])

    def to_json(self) -> dict[str, Any]:
        """Everything, ready for json."""
        return {
            "key": list(self.key),
            "payload": [each.to_json() for each in self.payload],
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "error": None if self.error is None else asdict(self.error),
            "timings": None if self.timings is None else asdict(self.timings),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any], kind: RequestKind[Any, Any]) -> Output:
        """The inverse of `to_json`, also of what was written before outputs had timings, and payloads their name."""
        error, timings = value["error"], value.get("timings")
        payload = value["payload"] if "payload" in value else value["choices"]
        return cls(
            RequestKey(*value["key"]),
            tuple(map(kind.part, payload)),
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


R = TypeVar("R", bound=Request)
O = TypeVar("O", bound=JobOptions)  # noqa: E741


@dataclass(frozen=True, slots=True)
class RequestKind(Generic[R, O]):
    """One kind of request: how the store reads what it keeps of one, and what a batch counts of its answers.

    `request`: of index, custom_id, body and its job's options, as the job wants it run. `options`: of what was asked
    for, of what a worker has settled (None before), and of the defaults of the engine that asks. `part`: of what
    `OutputPart.to_json` wrote. `finish_reasons`: `stop` or `length` for each part; None for a kind whose parts have
    none, so that nothing is counted.
    """

    name: str
    request: Callable[[int, str, str, O], R]
    options: Callable[[Mapping[str, Any], Mapping[str, Any] | None, Any], O]
    part: Callable[[Mapping[str, Any]], OutputPart]
    finish_reasons: Callable[[Output], Iterable[str]] | None = None


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a job came from: its file, the command line, and the versions that it was submitted with."""

    file_name: str
    file_sha256: str
    command: str
    versions: Mapping[str, str] = field(default_factory=dict)
