"""Values that requests of every kind share: the key of one, its output, and the description of a kind.

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

#: The only kind before revision 0012 of the store; a value that names no kind is of it.
FIRST_KIND = "generation"
#: A request's custom_id has 1 to this many characters.
CUSTOM_ID_LENGTH = 256
DEFAULT_BATCH_SIZE = 64
#: The longest line of a prompt file, in bytes, where the settings say nothing else.
DEFAULT_LINE_BYTES = 16 * 1024**2
#: The largest value of that setting: longer texts do not go into every database.
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
    """The key of a request: its job and its place in the file, from 0."""

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
    """Options of a job's flags for all of its requests. `adapters`: the names that a request may name, sorted."""

    @property
    def adapters(self) -> tuple[str, ...]: ...

    def to_json(self) -> dict[str, Any]:
        """The options asked for, ready for json; empty where there are none."""

    def settled(self) -> dict[str, Any]:
        """The options that the first worker of a job writes down, so that they hold for all of its requests."""


class OutputPart(Protocol):
    """One part of an output, such as a choice of a generation."""

    @property
    def size_bytes(self) -> int:
        """The approximate size in the store, computed without encoding it."""

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
    """The error of a request without an answer: a code of ErrorCode, and a sentence for the user."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Output:
    """The answer to one request: the parts of its kind, token counts and timings, or an error."""

    key: RequestKey
    payload: tuple[OutputPart, ...] = ()
    prompt_tokens: int = 0
    #: Tokens of all parts.
    completion_tokens: int = 0
    error: OutputError | None = None
    #: None where the engine answers a whole micro-batch at once.
    timings: Timings | None = None

    @property
    def state(self) -> RequestState:
        if self.error is None:
            return RequestState.SUCCEEDED
        cancelled = self.error.code == ErrorCode.CANCELLED
        return RequestState.CANCELLED if cancelled else RequestState.FAILED

    @property
    def size_bytes(self) -> int:
        """The approximate size of its payload in the store, computed without encoding it."""
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
        """The inverse of `to_json`, also of texts from before outputs had timings, and payloads their name."""
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
        """The error output of one request; characters of the message that no database can hold become U+FFFD."""
        told = _UNSTORABLE.sub("\ufffd", message)
        return cls(key, prompt_tokens=prompt_tokens, error=OutputError(code.value, told))


R = TypeVar("R", bound=Request)
O = TypeVar("O", bound=JobOptions)  # noqa: E741


@dataclass(frozen=True, slots=True)
class RequestKind(Generic[R, O]):
    """One kind of request: the functions that read its texts in the store, and the reasons that a batch counts."""

    name: str
    #: Makes a request of index, custom_id, body and its job's options, as the job wants it run.
    request: Callable[[int, str, str, O], R]
    #: Makes a job's options of those asked for, those that a worker has settled (None before) and the defaults of the
    #: engine that asks.
    options: Callable[[Mapping[str, Any], Mapping[str, Any] | None, Any], O]
    #: Makes a part of the object that `OutputPart.to_json` wrote.
    part: Callable[[Mapping[str, Any]], OutputPart]
    #: `stop` or `length` for each part; None for a kind whose parts have none, so that nothing is counted.
    finish_reasons: Callable[[Output], Iterable[str]] | None = None


@dataclass(frozen=True, slots=True)
class Provenance:
    """The origin of a job: its file, the command line, and the versions that it was submitted with."""

    file_name: str
    file_sha256: str
    command: str
    versions: Mapping[str, str] = field(default_factory=dict)
