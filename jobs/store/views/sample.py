"""A sample of a job's requests, of bounded size however long the file: how long prompts and answers are.

Half of it lies evenly over the whole file, half over its beginning up to where answers are, by the primary keys alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import JSON, ColumnElement, Text, and_, case, cast, func, select

from batchmill.jobs.requests.states import RequestState
from batchmill.jobs.store.bounds import octets
from batchmill.jobs.store.database.database import Database
from batchmill.jobs.store.tables import outputs, requests

#: A longer request is not parsed, which would take the database long.
_PARSED_BYTES = 1 << 16
#: So many requests of the whole file, and so many of its beginning.
SAMPLED = 256


@dataclass(frozen=True, slots=True)
class SampledRequest:
    """One request."""

    index: int
    body_bytes: int
    #: The state of its output, None while it is pending.
    state: RequestState | None = None
    #: Tokens of its answer.
    completion_tokens: int = 0
    #: The most that all choices of its answer may have, where its line says so.
    max_tokens: int | None = None


def spread(total: int, *, begun: int) -> list[int]:
    """Indexes of a file of `total` requests, of which the first `begun` have been begun, in order."""
    parts = ((total, min(total, SAMPLED)), (begun, min(begun, SAMPLED)))
    return sorted({place * length // count for length, count in parts for place in range(count)})


class SampleView:
    """Reads samples; long prompts are not read, the database knows their bytes."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def of(self, job_id: str, *, total: int, begun: int, choices: int = 1) -> tuple[SampledRequest, ...]:
        """The sample, in file order. `choices`: the number of an answer's choices where its line does not say."""
        same = and_(outputs.c.job_id == requests.c.job_id, outputs.c.index == requests.c.index)
        body_bytes = octets(self._database, requests.c.body)
        chosen = (
            select(
                requests.c.index,
                body_bytes.label("body_bytes"),
                case((body_bytes <= _PARSED_BYTES, self._sampling())).label("sampling"),
                outputs.c.state,
                outputs.c.completion_tokens,
            )
            .select_from(requests.outerjoin(outputs, same))
            .where(requests.c.job_id == job_id, requests.c.index.in_(spread(total, begun=begun)))
            .order_by(requests.c.index)
        )
        with self._database.read() as connection:
            rows: Sequence[Any] = connection.execute(chosen).all()
        return tuple(
            SampledRequest(
                row.index,
                row.body_bytes,
                None if row.state is None else RequestState(row.state),
                row.completion_tokens or 0,
                _most_tokens(row.sampling, choices),
            )
            for row in rows
        )

    def _sampling(self) -> ColumnElement[str]:
        """The sampling options of a request's own line, in JSON."""
        if self._database.is_sqlite:
            return func.json_extract(requests.c.body, "$.sampling")
        return cast(cast(requests.c.body, JSON)["sampling"], Text)


def _most_tokens(sampling: str | None, choices: int) -> int | None:
    options = json.loads(sampling) if sampling else {}
    return options["max_tokens"] * (options.get("n") or choices) if options.get("max_tokens") else None
