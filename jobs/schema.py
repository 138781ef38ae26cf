"""The values that travel between modules: ModelSpec, SamplingParams, Request, Output, and the states.

Everything here is frozen and changed by copy. Nothing here knows SQL, Redis, files or tensors.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, quote, unquote, urlencode

from jobs.errors import UsageError

#: Literal model names: the bundled model, and the engine without a model that answers with the prompt.
DEMO, ECHO = "demo", "echo"
#: Letters and digits that cannot be taken for one another when a job's id is typed.
ID_ALPHABET = "abcdefghjkmnpqrstuvwxyz23456789"
ID_LENGTH = 8
QUEUE_NAME_LENGTH = 24
#: A request's custom_id has 1 to this many characters.
CUSTOM_ID_LENGTH = 256
DEFAULT_BATCH_SIZE = 64
#: A batch is closed or retried within one transaction of at most half a second, so it is bounded.
MAX_BATCH_SIZE = 5_000

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


class Quantization(StrEnum):
    """How the weights of a model are held on the device."""

    NF4 = "nf4"  #: 4-bit NormalFloat with double quantization
    FP4 = "fp4"  #: 4-bit float with double quantization
    INT8 = "int8"  #: LLM.int8()
    NONE = "none"  #: the checkpoint's dtype on CUDA, float32 on a CPU


class JobState(StrEnum):
    LOADING = "loading"  #: its file is being read; no command shows it and no worker claims it
    QUEUED = "queued"
    RUNNING = "running"
    COMPLETED = "completed"  #: every request has an output, also when all of them are errors
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


class BatchState(StrEnum):
    PENDING = "pending"
    LEASED = "leased"
    DONE = "done"
    CANCELLED = "cancelled"


class RequestState(StrEnum):
    """A request's state follows from its output: without one it is pending."""

    PENDING = "pending"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class WorkerState(StrEnum):
    STARTING = "starting"
    LOADING = "loading"
    READY = "ready"  #: holds its model, whether or not there is work
    DRAINING = "draining"
    STOPPED = "stopped"
    FAILED = "failed"  #: its model cannot be loaded; the reason is kept with it


class RunOutcome(StrEnum):
    """How one attempt of one worker at one batch ended."""

    DONE = "done"
    RELEASED = "released"  #: handed back by a worker that drains, or that another worker relieved
    CANCELLED = "cancelled"
    CRASHED = "crashed"  #: the worker's process died
    EXPIRED = "expired"  #: the lease was not renewed in time


#: The states from which a job or a batch may enter each state; every UPDATE of a state is held to it.
JOB_BEFORE: Mapping[JobState, frozenset[JobState]] = {
    JobState.QUEUED: frozenset({JobState.LOADING, JobState.COMPLETED, JobState.CANCELLED}),
    JobState.RUNNING: frozenset({JobState.QUEUED}),
    JobState.COMPLETED: frozenset({JobState.RUNNING}),
    JobState.CANCELLING: frozenset({JobState.QUEUED, JobState.RUNNING}),
    JobState.CANCELLED: frozenset({JobState.CANCELLING}),
}
BATCH_BEFORE: Mapping[BatchState, frozenset[BatchState]] = {
    BatchState.PENDING: frozenset({BatchState.LEASED}),
    BatchState.LEASED: frozenset({BatchState.PENDING}),
    BatchState.DONE: frozenset({BatchState.LEASED}),
    BatchState.CANCELLED: frozenset({BatchState.PENDING, BatchState.LEASED}),
}
CLAIMABLE_JOB_STATES = frozenset({JobState.QUEUED, JobState.RUNNING})
OPEN_JOB_STATES = CLAIMABLE_JOB_STATES | {JobState.CANCELLING}
CLOSED_JOB_STATES = frozenset({JobState.COMPLETED, JobState.CANCELLED})
OPEN_BATCH_STATES = frozenset({BatchState.PENDING, BatchState.LEASED})


class ErrorCode(StrEnum):
    """The codes of error outputs."""

    CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
    NO_CHAT_TEMPLATE = "no_chat_template"
    CHAT_TEMPLATE_ERROR = "chat_template_error"
    OUT_OF_MEMORY = "out_of_memory"
    ENGINE_ERROR = "engine_error"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What a worker holds and a queue serves: model, revision as written, and quantization.

    `model` is a Hugging Face id, the real path of a folder, or one of the literal names `demo` and `echo`.
    """

    model: str
    revision: str | None = None
    quantization: Quantization = Quantization.NF4

    @classmethod
    def parse(
        cls,
        model: str,
        *,
        quantization: str | None = None,
        revision: str | None = None,
        remote_path: bool = False,
    ) -> ModelSpec:
        """The spec of what a user wrote; `remote_path` takes a folder that exists on the workers alone.

        Raises UsageError for a folder that does not exist here, and for names that mean nothing.
        """
        name = _model_identity(model, remote_path=remote_path)
        if revision is not None and (name in (DEMO, ECHO) or _is_path(name)):
            raise UsageError(f"--revision goes with a Hugging Face id, and {model!r} is none")
        return cls(name, revision or None, _quantization_of(name, quantization))

    @classmethod
    def from_canonical(cls, text: str) -> ModelSpec:
        """The spec that `canonical` spelled."""
        model, _, query = text.partition("?")
        options = dict(parse_qsl(query, strict_parsing=True))
        return cls(unquote(model), options.get("revision"), Quantization(options["quantization"]))

    @property
    def canonical(self) -> str:
        """The one spelling of this spec: equal specs spell the same, different ones differently."""
        options = {"quantization": self.quantization.value}
        if self.revision is not None:
            options["revision"] = self.revision
        return f"{quote(self.model, safe='/')}?{urlencode(options)}"

    @property
    def queue(self) -> str:
        """The Redis queue of this spec: characters that are safe in Redis keys and patterns alone."""
        digest = hashlib.sha256(self.canonical.encode()).hexdigest()[:12]
        name = re.sub(r"[^a-z0-9]+", "-", self.model.rsplit("/", 1)[-1].lower()).strip("-")
        return f"bm-{name[:QUEUE_NAME_LENGTH].strip('-') or 'model'}-{digest}"

    @property
    def folder(self) -> Path | None:
        """The folder this spec names, or None for a Hugging Face id and the literal names."""
        return Path(self.model) if _is_path(self.model) else None

    def command_line(self) -> list[str]:
        """The words of the command that starts a worker for this spec."""
        words = ["batchmill", "worker", "-m", self.model]
        if self.model != ECHO:
            words += ["-q", self.quantization.value]
        if self.revision is not None:
            words += ["--revision", self.revision]
        return words

    def __str__(self) -> str:
        at = f"@{self.revision}" if self.revision is not None else ""
        return f"{self.model}{at} ({self.quantization.value})"


def _is_path(name: str) -> bool:
    return name.startswith("/")


def _model_identity(model: str, *, remote_path: bool) -> str:
    if not model or any(ord(character) < 32 for character in model):
        raise UsageError("the model's name is empty or holds control characters")
    if model in (DEMO, ECHO):
        return model
    written_as_path = model.startswith(("/", "./", "../", "~")) or model in (".", "..")
    path = Path(model).expanduser()
    if remote_path:
        if not path.is_absolute():
            raise UsageError(f"--remote-path takes the absolute path of a folder, not {model!r}")
        return str(path)
    if path.is_dir():
        return str(path.resolve())
    if written_as_path or not _HUB_ID.fullmatch(model):
        raise UsageError(
            f"there is no folder {model!r} here; pass --remote-path if only the workers have it, "
            "or a Hugging Face id such as org/name"
        )
    return model


def _quantization_of(model: str, written: str | None) -> Quantization:
    if model == ECHO:
        if written not in (None, Quantization.NONE.value):
            raise UsageError("echo holds no weights: its quantization is always none")
        return Quantization.NONE
    try:
        return Quantization(written or Quantization.NF4.value)
    except ValueError:
        raise UsageError(f"unknown quantization {written!r}; choose one of {', '.join(Quantization)}") from None


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """What a request asks of the sampler; None asks for nothing, and the next level decides.

    The levels: the request's own line, then the job's flags, then the model's generation_config, then
    temperature 1.0 and max_tokens 256 (`SamplingParams.fallback()`).
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop: tuple[str, ...] | None = None
    seed: int | None = None

    @classmethod
    def fallback(cls) -> SamplingParams:
        """What holds where neither the request, nor the job, nor the model says anything."""
        return cls(max_tokens=256, temperature=1.0)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> SamplingParams:
        """The inverse of `to_json`; an unknown key is refused."""
        values = dict(value)
        if values.get("stop") is not None:
            values["stop"] = tuple(values["stop"])
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        """The keys that were asked for, ready for json."""
        values = ((name, getattr(self, name)) for name in _SAMPLING_NAMES)
        return {name: list(v) if name == "stop" else v for name, v in values if v is not None}

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

    `passthrough` holds what is kept and returned without effect (user, metadata, store, service_tier).
    """

    index: int
    custom_id: str
    prompt: str | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    sampling: SamplingParams = NO_SAMPLING
    chat_template_kwargs: Mapping[str, Any] | None = None
    passthrough: Mapping[str, Any] | None = None

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
        return _to_json(body)

    @classmethod
    def from_body(cls, index: int, custom_id: str, body: str) -> Request:
        """The inverse of `to_body`; an unknown key is refused."""
        values = json.loads(body)
        if "sampling" in values:
            values["sampling"] = SamplingParams.from_json(values["sampling"])
        if "messages" in values:
            values["messages"] = tuple(values["messages"])
        return cls(index, custom_id, **values)

    def under(self, options: JobOptions) -> Request:
        """This request as its job wants it run: sampling filled up, the job's system message in front.

        With a system message of the job, a plain prompt becomes the user's message of a chat.
        """
        request = replace(self, sampling=self.sampling.over(options.sampling))
        if options.system is None:
            return request
        messages = self.messages or ({"role": "user", "content": self.prompt},)
        if messages[0].get("role") not in ("system", "developer"):
            messages = ({"role": "system", "content": options.system}, *messages)
        return replace(request, prompt=None, messages=messages)


_to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


@dataclass(frozen=True, slots=True)
class JobOptions:
    """What a job's flags ask for all of its requests."""

    system: str | None = None
    sampling: SamplingParams = NO_SAMPLING

    def to_json(self) -> dict[str, Any]:
        """`{"system": ..., sampling keys ...}` without what was not asked for."""
        system = {} if self.system is None else {"system": self.system}
        return system | self.sampling.to_json()

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> JobOptions:
        """The inverse of `to_json`; an unknown key is refused."""
        sampling = {key: each for key, each in value.items() if key != "system"}
        return cls(value.get("system"), SamplingParams.from_json(sampling))


@dataclass(frozen=True, slots=True)
class Choice:
    """One answer to a request; `finish_reason` is `stop` or `length`."""

    text: str
    finish_reason: str


@dataclass(frozen=True, slots=True)
class OutputError:
    """Why a request has no answer: a code of ErrorCode, and a sentence for the user."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Output:
    """What came back for one request: choices and token counts, or an error."""

    key: RequestKey
    choices: tuple[Choice, ...] = ()
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: OutputError | None = None

    @property
    def state(self) -> RequestState:
        if self.error is None:
            return RequestState.SUCCEEDED
        cancelled = self.error.code == ErrorCode.CANCELLED
        return RequestState.CANCELLED if cancelled else RequestState.FAILED

    def choices_json(self) -> str:
        """The choices as the store keeps them."""
        return _to_json([asdict(choice) for choice in self.choices])

    @classmethod
    def failed(cls, key: RequestKey, code: ErrorCode, message: str, *, prompt_tokens: int = 0) -> Output:
        """The error output of one request."""
        return cls(key, prompt_tokens=prompt_tokens, error=OutputError(code.value, message))


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on a device: torch's allocated and reserved on CUDA; on a CPU the process's resident bytes."""

    weights_bytes: int = 0
    peak_allocated_bytes: int = 0
    peak_reserved_bytes: int = 0
    device_total_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a job came from: its file, the command line, and the versions that it was submitted with."""

    file_name: str
    file_sha256: str
    command: str
    versions: Mapping[str, str] = field(default_factory=dict)


def new_job_id() -> str:
    """A job's id: short, lower case, random."""
    return "".join(secrets.choice(ID_ALPHABET) for _ in range(ID_LENGTH))
