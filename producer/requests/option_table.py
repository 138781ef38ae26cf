"""The options of the sampler, a row each, of which the checks of lines, the flags and the documentation are made.

The names are those of SamplingParams. It knows no command line: that makes a flag of a row's `flag`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from batchmill.jobs.requests.generation import SamplingParams
from batchmill.producer.requests.checks import BOOLEAN, Check, integer, list_of, number
from batchmill.producer.requests.sampling_checks import (
    MAX_BIAS,
    MAX_INT32,
    MAX_NAMED,
    MAX_STOPS,
    MAX_TOP_LOGPROBS,
    STRUCTURED,
    logit_bias,
    logprobs_or_count,
    response_format,
    stop,
    structured_outputs,
    top_k,
)

MAX_CHOICES = 128
MAX_INT64 = 2**63 - 1
#: The groups of the flags, in the order of the help.
FLAG_GROUPS = _ANSWERS, _SAMPLING = ("Answers", "Sampling")
_FALLBACK = SamplingParams.fallback()


class Values(NamedTuple):
    """The values that an option takes."""

    check: Check
    words: str  #: the same for people


@dataclass(frozen=True, slots=True)
class OptionFlag:
    """The flag of `submit` and `run` for an option."""

    group: str  #: the title above it in their help
    kind: type  #: of its value: int, float, str, or dict for JSON; bool for a switch, which has none
    low: int | None = None  #: the least value that the command line takes
    high: int | None = None  #: the largest
    repeatable: bool = False
    hint: str = ""  #: the text in parentheses in its help


@dataclass(frozen=True, slots=True)
class SamplingOption:
    """One option."""

    name: str
    values: Values
    #: Its effect, in one sentence without its full stop.
    help: str
    #: The sentences that the documentation adds.
    more: str = ""
    #: The default in words, where SamplingParams has no fallback.
    default: str = ""
    flag: OptionFlag | None = None
    #: The checks of the other keys for it.
    spellings: Mapping[str, Check] = field(default_factory=dict)
    #: Its check in a line of a `prompt`, where that is another one.
    beside_prompt: Check | None = None

    @property
    def checks(self) -> dict[str, Check]:
        """The checks of all its keys, its own name first."""
        return {self.name: self.values.check, **self.spellings}

    @property
    def flag_name(self) -> str:
        return f"--{self.name.replace('_', '-')}"

    @property
    def flag_help(self) -> str:
        """The sentence of its flag."""
        fallback = getattr(_FALLBACK, self.name)
        hint = f"default {fallback}" if fallback is not None else self.flag.hint if self.flag is not None else ""
        return f"{self.help} ({hint})." if hint else f"{self.help}."


def markdown_table() -> str:
    """The options as a Markdown table for the documentation, which ends in a line feed."""
    rows = [("Key", "Flag", "Values", "Default", "Meaning"), ("---",) * 5, *map(_cells, OPTIONS)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def _cells(option: SamplingOption) -> tuple[str, ...]:
    fallback = getattr(_FALLBACK, option.name)
    return (
        ", ".join(f"`{key}`" for key in option.checks),
        "" if option.flag is None else f"`{option.flag_name}`",
        option.values.words,
        option.default if fallback is None else f"{fallback}",
        f"{option.help}. {option.more}".rstrip(),
    )


def _integer(low: int, high: int) -> Values:
    return Values(integer(low, high), f"an integer from {low}" + ("" if high == MAX_INT32 else f" to {high}"))


def _number(low: int, high: int, *, above: bool = False) -> Values:
    words = f"above {low} and at most {high}" if above else f"from {low} to {high}"
    return Values(number(low, high, above=above), f"a number {words}")


_BIASES = f'an object of up to {MAX_NAMED:,} token ids, from -{MAX_BIAS} to {MAX_BIAS} each: `{{"50256": -100}}`'
_TRUE_OR_FALSE = Values(BOOLEAN, "true or false")
_NUMBER_OF_CHOICES = _integer(1, MAX_CHOICES)
_TOKENS = _integer(1, MAX_INT32)
#: In the order of the help and of the documentation.
OPTIONS = (
    SamplingOption(
        "max_tokens",
        _TOKENS,
        "Maximum number of tokens in an answer",
        "The context of the model may leave fewer.",
        flag=OptionFlag(_ANSWERS, int, low=1),
        spellings={"max_completion_tokens": _TOKENS.check},
    ),
    SamplingOption(
        "min_tokens",
        _integer(0, MAX_INT32),
        "Minimum number of tokens in an answer",
        "Until then neither an end-of-sequence token nor `stop` or `stop_token_ids` ends it; a `response_format` may.",
        default="0",
        flag=OptionFlag(_ANSWERS, int),
    ),
    SamplingOption(
        "temperature",
        _number(0, 100),
        "Sampling temperature; 0 is greedy decoding",
        flag=OptionFlag(_SAMPLING, float, low=0, high=100),
    ),
    SamplingOption(
        "top_p",
        _number(0, 1),
        "Nucleus sampling: keep the most likely tokens up to this total probability",
        "At 0 only the most likely token is left.",
        default="1, all tokens",
        flag=OptionFlag(_SAMPLING, float, low=0, high=1),
    ),
    SamplingOption(
        "top_k",
        Values(top_k, "an integer from 1; 0 and -1 for no limit"),
        "Sample only from the K most likely tokens",
        default="no limit",
        flag=OptionFlag(_SAMPLING, int, low=1),
    ),
    SamplingOption(
        "min_p",
        _number(0, 1),
        "Drop tokens less likely than this fraction of the most likely token's probability",
        default="0, all tokens",
        flag=OptionFlag(_SAMPLING, float, hint="0 to 1"),
    ),
    SamplingOption(
        "repetition_penalty",
        _number(0, 100, above=True),
        "Penalize tokens that the prompt or the answer contains",
        "Values above 1 make these tokens less likely, values below 1 more likely.",
        default="1, none",
        flag=OptionFlag(_SAMPLING, float, hint="values above 1"),
    ),
    SamplingOption(
        "presence_penalty",
        _number(-2, 2),
        "Penalize tokens that the answer contains",
        "It is subtracted from their logits.",
        default="0, none",
        flag=OptionFlag(_SAMPLING, float, hint="-2 to 2"),
    ),
    SamplingOption(
        "frequency_penalty",
        _number(-2, 2),
        "Penalize tokens for each time that the answer contains them",
        "It is subtracted from their logits, once for each occurrence.",
        default="0, none",
        flag=OptionFlag(_SAMPLING, float, hint="-2 to 2"),
    ),
    SamplingOption(
        "logit_bias",
        Values(logit_bias, _BIASES),
        "Numbers to add to the logits of tokens",
        default="none",
    ),
    SamplingOption(
        "n",
        _NUMBER_OF_CHOICES,
        "Number of choices to generate for each request",
        "`best_of` is accepted where it equals `n`: all choices are returned.",
        default="1",
        flag=OptionFlag(_ANSWERS, int, hint=f"1 to {MAX_CHOICES}"),
        spellings={"best_of": _NUMBER_OF_CHOICES.check},
    ),
    SamplingOption(
        "seed",
        Values(integer(-MAX_INT64 - 1, MAX_INT64), "an integer of 64 bits"),
        "Random seed, for reproducible sampling of each request",
        "The same seed gives the same answer wherever the request runs in float32, or with `--deterministic`.",
        default="random",
        flag=OptionFlag(_SAMPLING, int, low=-MAX_INT64 - 1, high=MAX_INT64),
    ),
    SamplingOption(
        "stop",
        Values(stop, f"a string, or a list of up to {MAX_STOPS}"),
        "End an answer before this text",
        default="none",
        flag=OptionFlag(_ANSWERS, str, repeatable=True, hint="repeatable"),
    ),
    SamplingOption(
        "stop_token_ids",
        Values(list_of(integer(0, MAX_INT32), "token ids", most=MAX_NAMED), f"a list of up to {MAX_NAMED:,} token ids"),
        "End an answer at any of these tokens",
        default="none",
    ),
    SamplingOption(
        "ignore_eos",
        _TRUE_OR_FALSE,
        "Ignore end-of-sequence tokens, and generate up to the maximum number of tokens",
        default="false",
        flag=OptionFlag(_ANSWERS, bool),
    ),
    SamplingOption(
        "logprobs",
        _TRUE_OR_FALSE,
        "Return the log probability of each token of an answer",
        "Beside a `prompt`, a number from 0 is `top_logprobs`, as in `/v1/completions`.",
        default="false",
        beside_prompt=logprobs_or_count,
    ),
    SamplingOption(
        "top_logprobs",
        _integer(0, MAX_TOP_LOGPROBS),
        "Number of most likely tokens to return with each token of an answer",
        "It needs `logprobs` to be true.",
        default="0",
    ),
    SamplingOption(
        "response_format",
        Values(response_format, "an object of `type` `json_object`, `json_schema`, `regex`, `choice` or `text`"),
        "Format that answers must follow",
        "The other keys are vLLM's for the same.",
        default="text",
        flag=OptionFlag(_ANSWERS, dict, hint="json_object, or an object as in a line's response_format"),
        spellings={
            "guided_json": STRUCTURED["json"],
            "guided_regex": STRUCTURED["regex"],
            "guided_choice": STRUCTURED["choice"],
            "structured_outputs": structured_outputs,
        },
    ),
)
#: The options that have a flag, with it.
FLAGS = tuple((each, each.flag) for each in OPTIONS if each.flag is not None)
