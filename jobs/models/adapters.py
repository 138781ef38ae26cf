"""Adapter: the meaning of one LoRA adapter's name, parsed once from what a user wrote.

Owns the rule for names, and the JSON text that the store keeps. It loads nothing, and does not know which worker
holds an adapter, nor which request names one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from batchmill.jobs.errors import UsageError
from batchmill.jobs.models.spec import DEMO, ECHO, is_hub_id

#: An adapter's name has 1 to this many characters.
NAME_LENGTH = 64
#: The placeholder in a command for a place that only the user knows.
SOMEWHERE = "PATH_OR_ID"
_NAME = re.compile(rf"[A-Za-z0-9_][A-Za-z0-9._-]{{0,{NAME_LENGTH - 1}}}")


@dataclass(frozen=True, slots=True)
class Adapter:
    """A name and its meaning."""

    name: str
    #: The real path of a folder, or a Hugging Face id.
    path: str
    #: The revision of a Hugging Face id, as written.
    revision: str | None = None
    #: The content at the path (`jobs.models.identity`); None where nobody has read it.
    identity: str | None = None

    @classmethod
    def parse(cls, written: str) -> Adapter:
        """The adapter of `NAME=PATH_OR_ID[@REVISION]`.

        Raises UsageError for a bad name, for a folder that does not exist here, and for a folder with a revision.
        """
        name, sign, where = written.partition("=")
        if not sign or not where:
            raise UsageError(f"--adapter takes NAME=PATH_OR_ID, such as sql=./sql-lora, not {written!r}")
        check_name(name)
        folder = Path(where).expanduser()
        if folder.is_dir():  # whatever an @ in its name would mean
            return cls(name, str(folder.resolve()))
        path, _, revision = where.partition("@")
        if Path(path).expanduser().is_dir():
            raise UsageError(f"--adapter {written!r}: @{revision} goes with a Hugging Face id, and {path} is a folder")
        if not is_hub_id(path) or (not revision and "@" in where):
            raise UsageError(
                f"--adapter {written!r}: there is no folder {where!r} here, and it is no Hugging Face id "
                "such as org/name or org/name@revision"
            )
        return cls(name, path, revision or None)

    @property
    def where(self) -> str:
        """`PATH_OR_ID[@REVISION]`."""
        return self.path if self.revision is None else f"{self.path}@{self.revision}"

    @property
    def folder(self) -> Path | None:
        """The adapter's folder, None for a Hugging Face id."""
        return Path(self.path) if self.path.startswith("/") else None

    def agrees_with(self, other: Adapter) -> bool:
        """True where both are the same, as far as their content is known."""
        is_other = None not in (self.identity, other.identity) and self.identity != other.identity
        return (self.name, self.path, self.revision) == (other.name, other.path, other.revision) and not is_other

    def __str__(self) -> str:
        """The spelling that `parse` takes."""
        return f"{self.name}={self.where}"


def check_name(name: str) -> str:
    """The name, if an adapter may have it. Raises UsageError."""
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} is no name for an adapter: it takes 1 to {NAME_LENGTH} letters, digits, '.', '_' and '-', "
            "and begins with a letter, a digit or '_'"
        )
    if name in (DEMO, ECHO):
        raise UsageError(f"{name!r} is the name of a model; choose another for the adapter")
    return name


def check_all(adapters: Iterable[Adapter]) -> tuple[Adapter, ...]:
    """The adapters without duplicates, sorted by name. Raises UsageError for a name that means two things."""
    by_name: dict[str, Adapter] = {}
    for each in adapters:
        if by_name.setdefault(each.name, each) != each:
            raise UsageError(f"--adapter {each.name!r} is given twice: as {by_name[each.name].where} and {each.where}")
    return tuple(by_name[name] for name in sorted(by_name))


def to_json(adapters: Iterable[Adapter]) -> str:
    """The JSON text that the store keeps: `{name: {"path": ..., "revision": ..., "identity": ...}}`."""
    return json.dumps(
        {each.name: {"path": each.path, "revision": each.revision, "identity": each.identity} for each in adapters}
    )


def from_json(text: str | None) -> tuple[Adapter, ...]:
    """The inverse of `to_json`; none for None."""
    return tuple(Adapter(name, **meaning) for name, meaning in json.loads(text or "{}").items())
