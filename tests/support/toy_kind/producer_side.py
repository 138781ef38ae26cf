"""A count of words as its users write and read it."""

from __future__ import annotations

from typing import Any

from batchmill.jobs.store.views.jobs import Job, OutputRow
from batchmill.producer.requests.checks import STRING
from batchmill.producer.requests.forms import SHARED, AnswerKeys, Forms, LineForm, Parts, response_id
from tests.support.toy_kind.jobs_side import CountRequest

_FORM = LineForm(SHARED | {"sentence": STRING}, "sentence")


def _request(taken: dict[str, Any], index: int, custom_id: str, adapter: str | None) -> CountRequest:
    return CountRequest(index, custom_id, taken["sentence"], adapter=adapter)


def _answer(parts: Parts) -> AnswerKeys:
    return AnswerKeys({"words": parts[0]["words"] if parts else None}, {})


def _response(row: OutputRow, job: Job, parts: Parts) -> dict[str, Any]:
    return {"id": response_id("count-", job, row), "object": "count", "words": parts[0]["words"]}


COUNT = Forms(
    CountRequest.kind,
    lines={"sentence": _FORM},
    bodies={"/counts": _FORM},
    request=_request,
    options=frozenset(),
    answer=_answer,
    columns=("words",),
    response=_response,
)
