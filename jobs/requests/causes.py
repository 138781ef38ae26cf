"""Causes of error outputs: they tell whether another try of a request can end otherwise.

A job keeps its prompts, its options and, once it has an answer, its model; engine, device and settings are those of
the worker that tries again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from math import inf

from batchmill.jobs.requests.request import ErrorCode


class Cause(StrEnum):
    """Cause of an error, as people read it."""

    LINE = "its line alone decides that"
    LENGTH = "its prompt is too long"
    MODEL = "its line and the model decide that, and a job keeps the model that has answered some of it"
    AROUND = "engine, device or settings decide that"


CAUSES: Mapping[ErrorCode, Cause] = {
    ErrorCode.CONTEXT_LENGTH_EXCEEDED: Cause.LENGTH,
    ErrorCode.EMPTY_PROMPT: Cause.LINE,
    ErrorCode.UNKNOWN_TOKEN: Cause.MODEL,
    ErrorCode.NO_CHAT_TEMPLATE: Cause.MODEL,
    ErrorCode.CHAT_TEMPLATE_ERROR: Cause.LINE,
    ErrorCode.INVALID_RESPONSE_FORMAT: Cause.LINE,
    ErrorCode.UNSUPPORTED_OPTION: Cause.LINE,
    ErrorCode.UNSUPPORTED_BY_WORKER: Cause.AROUND,
    ErrorCode.OUT_OF_MEMORY: Cause.AROUND,
    ErrorCode.NOT_A_NUMBER: Cause.AROUND,
    ErrorCode.ENGINE_ERROR: Cause.AROUND,
    ErrorCode.POISON: Cause.AROUND,
    ErrorCode.CANCELLED: Cause.AROUND,
}


def cause_of(code: str) -> Cause:
    """The cause of an output's error; a code of another batchmill's counts as AROUND."""
    return CAUSES[ErrorCode(code)] if code in {each.value for each in ErrorCode} else Cause.AROUND


@dataclass(frozen=True, slots=True)
class Chances:
    """The facts that decide which requests of a job another try can end otherwise."""

    #: The largest of the live workers that may take the job, 0 where there is none.
    context_tokens: float = inf
    #: True where the job was answered in part.
    keeps_model: bool = True
    #: True where all of it is tried, whatever is to be expected.
    everything: bool = True

    def are_there(self, code: str, *, prompt_tokens: int) -> bool:
        """False for an error that another try would end with as well."""
        if self.everything:
            return True
        match cause_of(code):
            case Cause.LINE:
                return False
            case Cause.LENGTH:
                return prompt_tokens < self.context_tokens
            case Cause.MODEL:
                return not self.keeps_model
        return True
