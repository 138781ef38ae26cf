"""Options of the sampler as a line or a job's flags ask for them -> SamplingParams, where each has one name.

It owns which options contradict each other. The options themselves, with their checks and spellings, are rows of
`option_table`. It does not know what an engine makes of an option.

An option at its neutral value (`n` 1, a penalty of 0) is kept, since a line's values win over its job's; what is
empty, as `[]` or a `response_format` of text, asks for nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from batchmill.jobs.requests.generation import NO_SAMPLING, SamplingParams
from batchmill.producer.requests.checks import BadLine, Check, only, take
from batchmill.producer.requests.option_table import OPTIONS

#: The checks of the keys beside `messages`, and of those beside a `prompt`, by key.
CHAT_SAMPLING: dict[str, Check] = {key: check for each in OPTIONS for key, check in each.checks.items()} | {
    "echo": only(False)
}
PROMPT_SAMPLING = CHAT_SAMPLING | {each.name: each.beside_prompt for each in OPTIONS if each.beside_prompt is not None}
_FORMATTING = next(tuple(each.checks) for each in OPTIONS if each.name == "response_format")


def sampling_of(taken: dict[str, Any]) -> SamplingParams:
    """The parameters of what the checks of this module let through, under whichever names. Raises BadLine."""
    _merge_spellings(taken)
    _merge_formats(taken)
    if (top := taken.get("top_logprobs")) is not None and not taken.get("logprobs"):
        if top:
            raise BadLine("needs logprobs to be true", "top_logprobs")
        del taken["top_logprobs"]
    least, most = taken.get("min_tokens"), taken.get("max_tokens")
    if least is not None and most is not None and least > most:
        raise BadLine(f"is {least}, which is more than max_tokens, {most}", "min_tokens")
    return SamplingParams(**taken) if taken else NO_SAMPLING


def sampling_of_flags(flags: Mapping[str, Any]) -> SamplingParams:
    """The same of a job's flags, by the names of SamplingParams and in JSON's values. Raises BadLine."""
    return sampling_of(take(flags, CHAT_SAMPLING))


def _merge_spellings(taken: dict[str, Any]) -> None:
    """Leaves one name of each thing that has several."""
    completion = taken.pop("max_completion_tokens", None)
    if completion is not None and taken.setdefault("max_tokens", completion) != completion:
        raise BadLine("and max_tokens differ; give one of them", "max_completion_tokens")
    best_of, choices = taken.pop("best_of", None), taken.get("n", 1)
    if best_of is not None and best_of != choices:
        raise BadLine(f"must equal n, which is {choices}, not {best_of}: all choices are returned", "best_of")
    count = taken.get("logprobs")
    if type(count) is int:  # a number is what /v1/completions calls top_logprobs
        taken["logprobs"] = True
        if taken.setdefault("top_logprobs", count) != count:
            raise BadLine("and logprobs differ; give one of them", "top_logprobs")


def _merge_formats(taken: dict[str, Any]) -> None:
    """Leaves `response_format` of all the keys that set the format of an answer."""
    formats = {key: taken.pop(key) for key in _FORMATTING if key in taken}
    (first, form), *others = formats.items() or [("", None)]
    for key, other in others:
        if other != form:
            raise BadLine(f"and {first} contradict each other; give one of them", key)
    if form is not None:
        taken["response_format"] = form
