"""The job that a user asks for: a prompt file, its model and options, and the key that makes a submit idempotent.

It reads the file for its fingerprint alone; the store, and the requests in the file, are `producer.submit`'s.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

from batchmill.jobs.errors import UsageError
from batchmill.jobs.models.adapters import Adapter
from batchmill.jobs.models.quantization import Kind
from batchmill.jobs.models.spec import ModelSpec
from batchmill.jobs.requests.generation import GenerationOptions
from batchmill.jobs.requests.request import DEFAULT_BATCH_SIZE, JobOptions
from batchmill.jobs.runtime.files import formats

KEY_LENGTH = 256
#: The prefix of the keys that `once` makes, which a user's own may not have.
_ONCE = "once:"
_HASH_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Submission:
    """The job that a user asks for. Raises UsageError."""

    path: str
    #: By default, the one model that the file names.
    model: str | None = None
    quantization: str | None = None
    default_quantization: str = Kind.NF4.value
    revision: str | None = None
    #: The model is a folder that exists only on the workers' machines.
    remote_path: bool = False
    #: The form in which the file is read, if not as its suffix says.
    form: str | None = None
    #: Lines that name another model run, too.
    ignore_line_model: bool = False
    name: str | None = None
    options: JobOptions = field(default_factory=GenerationOptions)
    #: The adapters of `options.adapters`, where the same command starts the workers.
    adapters: tuple[Adapter, ...] = ()
    batch_size: int = DEFAULT_BATCH_SIZE
    command: str = ""
    #: The user's own key for this job.
    idempotency_key: str | None = None
    #: The job's fingerprint is its key.
    once: bool = False

    def __post_init__(self) -> None:
        self._check_adapters()
        key = self.idempotency_key
        if key is None:
            return
        if self.once:
            raise UsageError("--once and --idempotency-key exclude each other: give one of them")
        if not (0 < len(key) <= KEY_LENGTH and key.isprintable()) or key.startswith(_ONCE):
            raise UsageError(
                f"--idempotency-key takes 1 to {KEY_LENGTH} printable characters that do not begin with {_ONCE!r}"
            )

    def _check_adapters(self) -> None:
        names = self.options.adapters
        if self.model in names:
            raise UsageError(f"--adapter {self.model} is also the name of the model; rename the adapter")
        if names and self._is_text:
            raise UsageError(
                f"{self.path}: lines of plain text name no adapter; write each as "
                f'{{"prompt": "...", "adapter": "{names[0]}"}} in a .jsonl file'
            )

    @property
    def _is_text(self) -> bool:
        return formats.read_as(self.path, self.form) == "text"

    def spec(self, model: str) -> ModelSpec:
        return ModelSpec.parse(
            model,
            quantization=self.quantization,
            default_quantization=self.default_quantization,
            revision=self.revision,
            remote_path=self.remote_path,
        )

    @property
    def folders(self) -> list[Path]:
        """The folders of its model and adapters here; a Hugging Face id and the literal names have none."""
        model = [] if self.model is None else [self.spec(self.model).folder]
        return [each for each in (*model, *(each.folder for each in self.adapters)) if each is not None]

    @property
    def is_stream(self) -> bool:
        """True for a path that can be read only once. Raises OSError."""
        return self.path == "-" or not Path(self.path).is_file()

    def fingerprint(self, spec: ModelSpec, file_sha256: str) -> str:
        """A digest that is equal for the same file, model and request options; `run` continues a job by it."""
        parts = [file_sha256, spec.canonical, self.options.to_json()]
        if self._is_text:
            parts.append("txt")  # the same bytes are other requests in plain text than in JSONL
        if self.adapters:
            parts.append([str(each) for each in self.adapters])  # a name that means another adapter is another job
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def fingerprint_of_file(self, spec: ModelSpec) -> str | None:
        """The fingerprint, if the path is a file that can be read twice."""
        digest = hashlib.sha256()
        try:
            if self.is_stream:
                return None
            with Path(self.path).open("rb") as file:
                while block := file.read(_HASH_BYTES):
                    digest.update(block)
        except OSError:
            return None  # the next read of the file says why it cannot be read
        return self.fingerprint(spec, digest.hexdigest())

    def key(self, fingerprint: str) -> str | None:
        """The key under which no second job is opened; None where none was asked for."""
        return _ONCE + fingerprint if self.once else self.idempotency_key
