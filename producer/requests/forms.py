"""A kind of requests as a value of the users' side: the forms of its lines and result lines, and what all kinds share.

It knows no kind in particular (`producer.requests.kinds` does), nor files.
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
    """One form of a line, or of a part of it."""

    checks: Mapping[str, Check]  #: of the keys that it may have
    content: str  #: the key that it must have


class AnswerKeys(NamedTuple):
    """The keys of a result line that hold the answer."""

    always: dict[str, Any]  #: those of every line
    some: dict[str, Any]  #: those of some lines alone


@dataclass(frozen=True, slots=True)
class Forms:
    """One kind as its users write and read it."""

    #: Its name in `jobs.requests.kinds`.
    name: str
    #: Batchmill's own forms of a line, by the key that tells them.
    lines: Mapping[str, LineForm]
    #: The forms of the bodies of OpenAI Batch lines, by the endpoint without its version.
    bodies: Mapping[str, LineForm]
    #: Makes a request of what the checks let through, its index, custom_id and adapter. Raises BadLine.
    request: Callable[[dict[str, Any], int, str, str | None], Request]
    #: The options that a job's flags may set, as `JobOptions.to_json` names them.
    options: frozenset[str]
    #: Makes the keys of an answer of an output's parts, of which an error has none.
    answer: Callable[[Parts], AnswerKeys]
    #: The keys of `AnswerKeys.always`, in the order of CSV.
    columns: tuple[str, ...]
    #: Makes the body of an answer in OpenAI's form.
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
