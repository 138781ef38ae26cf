"""ModelSpec: a model, its revision and its quantization, parsed once and with one canonical spelling.

Queue names, store rows, logs and the loader's arguments all follow from it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl, quote, unquote, urlencode

from batchmill.jobs.errors import UsageError
from batchmill.jobs.models.quantization import NF4, Kind, Quantization

#: Literal model names: the bundled model, and the engine without a model that answers with the prompt.
DEMO, ECHO = "demo", "echo"
#: The folder of the bundled model.
DEMO_FOLDER = Path(__file__).parents[2] / "worker" / "demo" / "model"
_LONGEST_NAME = 2_000
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model as a worker holds it and a queue serves it."""

    #: A Hugging Face id, the real path of a folder, or one of the literal names `demo` and `echo`.
    model: str
    #: The revision of a Hugging Face id, as written; None for its default.
    revision: str | None = None
    quantization: Quantization = NF4

    @classmethod
    def parse(
        cls,
        model: str,
        *,
        quantization: str | None = None,
        revision: str | None = None,
        default_quantization: str = Kind.NF4.value,
        remote_path: bool = False,
    ) -> ModelSpec:
        """The spec of what a user wrote; `remote_path` takes a folder that exists on the workers alone.

        `default_quantization` holds where `quantization` is None and the model has weights.

        Raises UsageError for a folder that does not exist here, and for names that mean nothing or are too long.
        """
        _check_length(model, revision)
        name = _model_identity(model, remote_path=remote_path)
        _check_length(name, revision)
        if revision is not None and (name in (DEMO, ECHO) or _is_path(name)):
            raise UsageError(f"--revision goes with a Hugging Face id, and {model!r} is none")
        return cls(name, revision or None, _quantization_of(name, quantization, default_quantization))

    @classmethod
    def from_canonical(cls, text: str) -> ModelSpec:
        """The spec that `canonical` spelled."""
        model, _, query = text.partition("?")
        options = dict(parse_qsl(query, strict_parsing=True))
        return cls(unquote(model), options.get("revision"), Quantization.parse(options["quantization"]))

    @property
    def canonical(self) -> str:
        """The one spelling of this spec: equal specs spell the same, different ones differently."""
        options = {"quantization": self.quantization.canonical}
        if self.revision is not None:
            options["revision"] = self.revision
        return f"{quote(self.model, safe='/')}?{urlencode(options)}"

    @property
    def folder(self) -> Path | None:
        """The folder this spec names, or None for a Hugging Face id and the literal names."""
        return Path(self.model) if _is_path(self.model) else None

    def command_line(self) -> list[str]:
        """The words of the command that starts a worker for this spec."""
        words = ["batchmill", "worker", "-m", self.model]
        if self.model != ECHO:
            words += ["-q", self.quantization.canonical]
        if self.revision is not None:
            words += ["--revision", self.revision]
        return words

    def __str__(self) -> str:
        at = f"@{self.revision}" if self.revision is not None else ""
        return f"{self.model}{at} ({self.quantization})"


def is_hub_id(name: str) -> bool:
    """True where this could be a Hugging Face id; nothing here knows whether there is such a repository."""
    return _HUB_ID.fullmatch(name) is not None


def _is_path(name: str) -> bool:
    return name.startswith("/")


def _check_length(model: str, revision: str | None) -> None:
    """Refuses what the store could not keep in an index: PostgreSQL's entries have at most 2,704 bytes."""
    length = len(quote(model + (revision or ""), safe="/", errors="replace"))
    if length > _LONGEST_NAME:
        raise UsageError(
            f"the names of the model and its revision have {length:,} characters, with % codes for special ones; "
            f"at most {_LONGEST_NAME:,} can be kept: use shorter ones, or a link to the folder"
        )


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
    if written_as_path or not is_hub_id(model):
        raise UsageError(
            f"there is no folder {model!r} here; pass --remote-path if only the workers have it, "
            "or a Hugging Face id such as org/name"
        )
    return model


def _quantization_of(model: str, written: str | None, default: str) -> Quantization:
    if model == ECHO:
        if written not in (None, Kind.NONE.value):
            raise UsageError("echo holds no weights: its quantization is always none")
        return Quantization(Kind.NONE)
    return Quantization.parse(default if written is None else written)
