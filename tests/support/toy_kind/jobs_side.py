"""A count of words, as the store keeps it: the sentence, what it is split at, and how many words it has."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from batchmill.jobs.requests.request import RequestKind, to_text


@dataclass(frozen=True, slots=True)
class CountRequest:
    """One sentence whose words are counted."""

    kind: ClassVar[str] = "count"

    index: int
    custom_id: str
    sentence: str
    separator: str | None = None
    adapter: str | None = None

    def to_body(self) -> str:
        return to_text({"sentence": self.sentence})


@dataclass(frozen=True, slots=True)
class CountOptions:
    """Flags ask for nothing; the separator is the engine's."""

    separator: str
    adapters: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {}

    def settled(self) -> dict[str, Any]:
        return {"separator": self.separator}


@dataclass(frozen=True, slots=True)
class Count:
    """The one part of an answer."""

    words: int

    @property
    def size_bytes(self) -> int:
        return len(str(self.words))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def _request(index: int, custom_id: str, body: str, options: CountOptions) -> CountRequest:
    return CountRequest(index, custom_id, json.loads(body)["sentence"], options.separator)


def _options(asked: Mapping[str, Any], settled: Mapping[str, Any] | None, defaults: Any) -> CountOptions:
    assert not asked
    return CountOptions(**(settled or {"separator": defaults}))


def _part(value: Mapping[str, Any]) -> Count:
    return Count(**value)


COUNT = RequestKind(CountRequest.kind, _request, _options, _part)
