"""The options of a command's help in groups: their titles, and which options stand below each. It knows no click."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from batchmill.jobs.configuration.flags import ENGINE_FLAGS, PLACEMENT_FLAGS

#: The names of parameters by the title above them.
Groups = Mapping[str, tuple[str, ...]]

MODEL: Groups = {"Model": ("model", "named", "quantization", "revision", "remote_path", "adapter", "adapters")}
DEVICE: Groups = {"Device": ("device", "devices", "share_device", *(each.setting for each in PLACEMENT_FLAGS))}
ENGINE: Groups = {"Engine": tuple(each.setting for each in ENGINE_FLAGS)}
_OTHERS = "Options"


class Parameter(Protocol):
    """An option, or an argument, which the command's own text describes."""

    name: Any
    param_type_name: str

    def get_help_record(self, ctx: Any) -> tuple[str, str] | None: ...


class Formatter(Protocol):
    def section(self, name: str) -> AbstractContextManager[None]: ...

    def write(self, string: str) -> None: ...

    def write_dl(self, rows: Sequence[tuple[str, str]]) -> None: ...


def write_options(parameters: Iterable[Parameter], groups: Groups, ctx: Any, formatter: Formatter) -> None:
    """Writes a section for each group, and one for all that belong to none."""
    title_of = {name: title for title, names in groups.items() for name in names}
    rows: dict[str, list[tuple[str, str]]] = {title: [] for title in (*groups, _OTHERS)}
    for each in parameters:
        record = each.get_help_record(ctx) if each.param_type_name == "option" else None
        if record is not None:
            rows[title_of.get(each.name, _OTHERS)].append(record)
    for title, section in rows.items():
        if section:
            with formatter.section(title):
                formatter.write_dl(section)


def write_example(example: str | None, formatter: Formatter) -> None:
    """Writes an example as one line, however narrow the terminal is, so that it can be copied."""
    if example:
        formatter.write(f"\n  {example}\n")
