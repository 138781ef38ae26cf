"""Checks of decoded JSON, one value each, and how a bad one is refused: BadLine.

A check takes what a key holds and returns what is kept of it. Checks are made here and put together where keys
have a meaning (`generation`, `options`). The message about a bad value may show a key or a parameter, cut short, and
never a prompt.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import Any, NoReturn

SHOWN_LENGTH = 40
#: The share of letters in the same order from which two keys are alike.
_ALIKE = 0.7

#: Takes what one key holds, never null, and returns what is kept of it: None where it asks for nothing.
Check = Callable[[Any], Any]

_KINDS = {
    str: "a string", int: "a number", float: "a number", bool: "a boolean", list: "a list", dict: "an object"
}  # fmt: skip


class BadLine(Exception):
    """A line that cannot be taken; its text says where in it (`at`: a key, or empty) and what is wrong."""

    def __init__(self, what: str, at: str = "") -> None:
        super().__init__(f"{at} {what}" if at else what)
        self.what, self.at = what, at

    def inside(self, name: str) -> BadLine:
        """The same, one level up: `name` is the key, or the `[place]`, that holds `at`."""
        dot = "." if self.at and not self.at.startswith("[") else ""
        return BadLine(self.what, f"{name}{dot}{self.at}")


def shown(value: Any) -> str:
    """A key or a parameter as a message shows it: cut short, and of a list or an object its kind alone."""
    if value is None or type(value) is bool:
        return json.dumps(value)
    text = kind(value) if type(value) in (list, dict) else repr(value)
    return text if len(text) <= SHOWN_LENGTH else text[: SHOWN_LENGTH - 3] + "..."


def kind(value: Any) -> str:
    """The kind of a JSON value, in words."""
    return _KINDS.get(type(value), "null")


def take(value: Mapping[str, Any], checks: Mapping[str, Check], *needed: str) -> dict[str, Any]:
    """Takes an object key by key, as its checks return the values; a null asks for nothing.

    Raises BadLine for a bad value, a key without a check, and a `needed` key that is absent.
    """
    taken = {}
    for key, each in value.items():
        check = checks.get(key)
        if check is None:
            meant = meant_key(key, checks.keys() - value.keys())
            raise BadLine(f"is not supported here; {f'did you mean {meant}?' if meant else 'remove it'}", shown(key))
        if each is not None:
            try:
                kept = check(each)
            except BadLine as exc:
                raise exc.inside(key) from None
            if kept is not None:
                taken[key] = kept
    for key in needed:
        if key not in taken:
            raise BadLine("is missing or null", key)
    return taken


def meant_key(written: str, known: Iterable[str]) -> str | None:
    """The known key that this one is likely a slip of. Slips keep the first letter, so that few are compared."""
    if len(written) > SHOWN_LENGTH:
        return None
    key = written.casefold()
    matches = get_close_matches(key, [each for each in known if each[:1] == key[:1]], n=1, cutoff=_ALIKE)
    return matches[0] if matches else None


def take_each(values: list[Any], check: Check) -> list[Any]:
    """Every value as its check returns it; a refusal, which is a BadLine, says at which place."""
    kept: list[Any] = []
    try:
        for value in values:
            kept.append(check(value))
    except BadLine as exc:
        raise exc.inside(f"[{len(kept)}]") from None
    return kept


def integer(low: int, high: int) -> Check:
    """An integer from `low` to `high`, both included."""

    def check(value: Any) -> int:
        if type(value) is int and low <= value <= high:
            return value
        raise BadLine(f"must be an integer from {low} to {high}, not {shown(value)}")

    return check


def number(low: int, high: int, *, above: bool = False) -> Check:
    """A number from `low` (or `above` it) to `high`, kept as a float."""

    def check(value: Any) -> float:
        if type(value) in (int, float) and low <= value <= high and not (above and value == low):
            return float(value)
        bounds = f"above {low} and at most {high}" if above else f"from {low} to {high}"
        raise BadLine(f"must be a number {bounds}, not {shown(value)}")

    return check


def of(wanted: type) -> Check:
    """A value of one kind of JSON: str, bool, list or dict."""

    def check(value: Any) -> Any:
        if type(value) is wanted:
            return value
        raise BadLine(f"must be {_KINDS[wanted]}, not {kind(value)}")

    return check


def one_of(*accepted: str) -> Check:
    """One of some words."""

    def check(value: Any) -> Any:
        if type(value) is str and value in accepted:
            return value
        raise BadLine(f"must be one of {', '.join(accepted)}; it is {shown(value)}")

    return check


def list_of(check_one: Check, what: str, *, most: int) -> Check:
    """A list of at most `most` values that pass a check; an empty one asks for nothing."""

    def check(value: Any) -> tuple[Any, ...] | None:
        if type(value) is not list or len(value) > most:
            given = f"a list of {len(value)}" if type(value) is list else kind(value)
            raise BadLine(f"must be a list of at most {most} {what}, not {given}")
        return tuple(take_each(value, check_one)) or None

    return check


def only(*accepted: Any) -> Check:
    """The check of a key that is not supported, but for the values that ask for nothing."""

    def check(value: Any) -> None:
        if not any(type(value) is type(each) and value == each for each in accepted):
            instead = f" or write {json.dumps(accepted[0])}" if accepted else ""
            given = f" as {shown(value)}" if type(value) in (bool, int, float) else ""
            raise BadLine(f"is not supported{given}; remove it{instead}")

    return check


def refused(why: str) -> Check:
    """The check of a key that never stands here."""

    def check(value: Any) -> NoReturn:
        raise BadLine(why)

    return check


def filled_text(value: Any) -> str:
    """A string that is not empty."""
    if type(value) is str and value:
        return value
    raise BadLine("must be a string that is not empty" + ("" if value == "" else f", not {kind(value)}"))


STRING, OBJECT, BOOLEAN = of(str), of(dict), of(bool)
