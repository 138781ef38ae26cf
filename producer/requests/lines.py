"""One line of a prompt file, decoded -> one Request: which form it has, and what lines of all kinds share.

It owns batchmill's own lines, the envelope of OpenAI Batch lines, and what may be a custom_id. It does not know which
keys a kind has (its Forms do), nor files, bytes, JSON text or line numbers (`producer.files.prompt_file`), nor whether
a custom_id is unique (the store).

Each key of a line is obeyed, kept and returned, or refused by name; a null asks for nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from batchmill.jobs.requests.request import CUSTOM_ID_LENGTH, Request
from batchmill.producer.requests.checks import OBJECT, BadLine, Check, kind, meant_key, one_of, shown, take
from batchmill.producer.requests.forms import Forms, LineForm

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
#: With and without the version, as OpenAI's files and Azure's have them.
_VERSIONS = ("/v1", "")
_AdapterOf = Callable[[str | None, str | None], str | None]


class Lines:
    """Reads lines of these kinds."""

    def __init__(self, kinds: Iterable[Forms]) -> None:
        kinds = tuple(kinds)
        self._short = {
            key: (each, LineForm({**form.checks, "custom_id": _custom_id}, form.content))
            for each in kinds
            for key, form in each.lines.items()
        }
        self._endpoints = {
            f"{version}{path}": (each, form)
            for version in _VERSIONS
            for each in kinds
            for path, form in each.bodies.items()
        }
        self._envelope: dict[str, Check] = {
            "custom_id": _custom_id, "method": one_of("POST"), "url": one_of(*self._endpoints), "body": OBJECT
        }  # fmt: skip

    def request(self, line: Any, index: int, *, adapter_of: _AdapterOf) -> Request:
        """The request of one decoded line of JSON; `adapter_of` is given the model and the adapter that it names.

        It returns the request's adapter, if it has one. Raises BadLine, as `adapter_of` may.
        """
        if type(line) is not dict:
            raise BadLine(f"must be a JSON object, not {kind(line)}")
        forms, taken = self._taken(line)
        custom_id = taken.pop("custom_id", None) or f"request-{index}"
        adapter = None
        if "model" in taken or "adapter" in taken:
            adapter = adapter_of(taken.pop("model", None), taken.pop("adapter", None))
        return forms.request(taken, index, custom_id, adapter)

    def _taken(self, line: dict[str, Any]) -> tuple[Forms, dict[str, Any]]:
        """The kind of a line, and what its checks let through."""
        for key, (forms, form) in self._short.items():
            if line.get(key) is not None:
                return forms, take(line, form.checks, form.content)
        if "body" in line or "url" in line:
            return self._openai_batch(line)
        absent = ", ".join(f"no {key}" for key in self._short)
        raise BadLine(f"holds {absent}, and no url and body of an OpenAI Batch line{self._guess(line)}")

    def _openai_batch(self, line: dict[str, Any]) -> tuple[Forms, dict[str, Any]]:
        envelope = take(line, self._envelope, "url", "body")
        forms, form = self._endpoints[envelope["url"]]
        try:
            taken = take(envelope["body"], form.checks, form.content)
        except BadLine as exc:
            raise exc.inside("body") from None
        if "custom_id" in envelope:
            taken["custom_id"] = envelope["custom_id"]
        return forms, taken

    def _guess(self, line: dict[str, Any]) -> str:
        """The key that a line lacks, where one of its keys is likely a slip of it."""
        absent = {*self._short, "body", "url"} - line.keys()
        slips = ((key, meant) for key in line if (meant := meant_key(key, absent)) is not None)
        return next((f"; did you mean {meant} by {shown(key)}?" for key, meant in slips), "")


def _custom_id(value: Any) -> str:
    if type(value) is str and 0 < len(value) <= CUSTOM_ID_LENGTH and not _CONTROL.search(value):
        return value
    wanted = f"1 to {CUSTOM_ID_LENGTH} characters, none of them control characters"
    raise BadLine(f"must be a string of {wanted}; it is {shown(value)}")
