"""The flags of `submit` and `run` for all requests of a job -> its GenerationOptions, or UsageError by the flag's name.

It takes what the command line made of the flags, by the names of its parameters, and knows no command line itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from batchmill.jobs.errors import UsageError
from batchmill.jobs.models.adapters import check_name
from batchmill.jobs.requests.generation import GenerationOptions, SamplingParams
from batchmill.producer.requests.checks import OBJECT, BadLine
from batchmill.producer.requests.option_table import FLAGS, OptionFlag
from batchmill.producer.requests.options import sampling_of_flags
from batchmill.producer.requests.strict_json import json_value


def job_options(options: Mapping[str, Any], *, adapters: tuple[str, ...]) -> GenerationOptions:
    """The options of a job that declares these adapters. Raises UsageError."""
    return GenerationOptions(options["system"], _sampling(options), _chat_template_kwargs(options), adapters)


def adapter_names(written: Sequence[str]) -> list[str]:
    """The adapters that --adapter of `submit` names. Raises UsageError."""
    for each in written:
        name, sign, _ = each.partition("=")
        if sign:
            raise UsageError(
                f"--adapter {each!r}: a submit takes the name alone, --adapter {name}; the worker that holds it says "
                f"where it is: batchmill worker -m MODEL --adapter {each}"
            )
    return [check_name(each) for each in written]


def refuse_no_text(options: Mapping[str, Any]) -> None:
    """Raises UsageError for a value that cannot be stored as text; the file's name may be any bytes."""
    for name, value in options.items():
        for text in value if isinstance(value, tuple) else (value,):
            if name != "file" and isinstance(text, str) and not _is_utf8(text):
                raise UsageError(f"--{name.replace('_', '-')} is not UTF-8; the terminal's locale may be another")


def _sampling(options: Mapping[str, Any]) -> SamplingParams:
    values = {option.name: _line_value(option.name, flag, options[option.name]) for option, flag in FLAGS}
    try:
        return sampling_of_flags(values)
    except BadLine as error:
        raise _bad_flag(*error.at.split(".", 1), error.what) from None


def _line_value(name: str, flag: OptionFlag, value: Any) -> Any:
    """The value as a line would have it; None where the flag was not given."""
    if flag.repeatable:
        return list(value)
    if flag.kind is bool:
        return value or None
    return _object(name, value) if flag.kind is dict and value is not None else value


def _object(name: str, written: str) -> Any:
    """The JSON object of a flag; a value that is no object names its type alone."""
    return _json(name, written) if written.lstrip().startswith("{") else {"type": written}


def _chat_template_kwargs(options: Mapping[str, Any]) -> dict[str, Any] | None:
    written = options["chat_template_kwargs"]
    if written is None:
        return None
    try:
        return OBJECT(_json("chat_template_kwargs", written)) or None
    except BadLine as error:
        raise _bad_flag("chat_template_kwargs", str(error)) from None


def _json(name: str, written: str) -> Any:
    try:
        return json_value(written)
    except BadLine as error:
        raise _bad_flag(name, str(error)) from None


def _bad_flag(name: str, *what: str) -> UsageError:
    return UsageError(f"--{name.replace('_', '-')} {' '.join(what)}")


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
