"""The value that is a kind on the users' side, which is the forms of its lines and result lines; and what all share.

It knows no one kind (`producer.requests.kinds` does), nor files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from batchmill.jobs.requests.request import Request
from batchmill.jobs.store.views.jobs import Job, OutputRow
from batchmill.producer.requests.checks import BOOLEAN, OBJECT, STRING, BadLine, Check, filled_text, shown

#: Parts of one output as the store has them, decoded.
Parts = Sequence[Mapping[str, Any]]


class LineForm(NamedTuple):
    """The checks of the keys that an object may have, and the key that it must."""

    checks: Mapping[str, Check]
    content: str


class AnswerKeys(NamedTuple):
    """The keys of a result line that say what was answered: those of every line, and those of some lines alone."""

    always: dict[str, Any]
    some: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Forms:
    """One kind as its users write and read it; `name` is that of `jobs.requests.kinds`.

    `lines`: batchmill's own forms of a line, by the key that tells them. `bodies`: those of the bodies of OpenAI Batch
    lines, by the endpoint without its version. `request`: of what the checks let through, of index, custom_id and
    adapter; it raises BadLine. `options`: what a job's flags may ask for, as `JobOptions.to_json` has it.
    `answer`: of an output's parts, none for an error. `columns`: the keys of `AnswerKeys.always`, in the order of CSV.
    `response`: the body of an answer in OpenAI's form.
    """

    name: str
    lines: Mapping[str, LineForm]
    bodies: Mapping[str, LineForm]
    request: Callable[[dict[str, Any], int, str, str | None], Request]
    options: frozenset[str]
    answer: Callable[[Parts], AnswerKeys]
    columns: tuple[str, ...]
    response: Callable[[OutputRow, Job, Parts], dict[str, Any]]


def model_name(value: Any) -> str:
    """The check of a model's name."""
    if type(value) is str and value:
        return value
    raise BadLine(f"must be the name of a model, not {shown(value)}")


#: Keys that are kept and returned without effect.
KEPT: dict[str, Check] = {"user": STRING, "metadata": OBJECT, "store": BOOLEAN, "service_tier": STRING}
#: The keys beside the content that every form has.
SHARED: dict[str, Check] = {"model": model_name, "adapter": filled_text} | KEPT


def take_kept(taken: dict[str, Any]) -> dict[str, Any] | None:
    """Takes what is kept without effect out of what the checks let through; None where there is none."""
    return {key: taken.pop(key) for key in KEPT if key in taken} or None


def response_id(prefix: str, job: Job, row: OutputRow) -> str:
    """An id that follows from job and index, so that two exports are equal."""
    return prefix + hashlib.sha256(f"{prefix}{job.id}/{row.index}".encode()).hexdigest()[:24]


def adapter_of(row: OutputRow) -> str | None:
    """The adapter that the request named."""
    if '"adapter":' not in row.body:
        return None
    named: str | None = json.loads(row.body).get("adapter")
    return named
