"""JSON text -> its one value, strictly: of unique keys, finite numbers, and text that every database can hold.

It knows the grammar alone, and neither what a value means nor where the text came from.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any, NoReturn

from batchmill.producer.requests.checks import BadLine, shown

MAX_DEPTH = 64
_BLANKS = " \t\r\n"
#: Possessive, and content with a string that never ends, so that no line makes it slow.
_STRING = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_NO_BRACKETS = re.compile(r"[^][{}]+")


def json_value(text: str) -> Any:
    """The value of a line of JSON. Raises BadLine."""
    line = text.rstrip(_BLANKS)
    if line.count("{") + line.count("[") > MAX_DEPTH and _is_too_deep(line):
        raise BadLine(f"nested deeper than {MAX_DEPTH} levels")
    try:
        value, end = _decoder.raw_decode(line, len(line) - len(line.lstrip(_BLANKS)))
    except json.JSONDecodeError as exc:
        if "\0" in line:
            raise BadLine(f"holds a NUL character at column {line.index(chr(0)) + 1}") from None
        what = exc.msg.removesuffix(" at").rstrip(": ")
        raise BadLine(f"not JSON: {what} at column {exc.pos + 1}") from None
    except ValueError:
        raise BadLine(f"holds a number of more than {sys.get_int_max_str_digits()} digits") from None
    if end != len(line):
        raise BadLine(f"not JSON: more text after the value, at column {end + 1}")
    if "\\u" in line:
        _refuse_half_characters(value)
    return value


def _is_too_deep(line: str) -> bool:
    depth = 0
    for bracket in _NO_BRACKETS.sub("", _STRING.sub("", line)):
        depth += 1 if bracket in "{[" else -1
        if depth > MAX_DEPTH:
            return True
    return False


def _refuse_half_characters(value: Any) -> None:
    """Databases store neither NUL nor half a surrogate pair; into JSON they come as escapes alone."""
    for text in _strings(value):
        if "\0" in text:
            raise BadLine("holds a NUL character (\\u0000)")
        try:
            text.encode()
        except UnicodeEncodeError as exc:
            raise BadLine(f"holds half a surrogate pair (\\u{ord(text[exc.start]):04x})") from None


def _strings(value: Any) -> Iterator[str]:
    if type(value) is str:
        yield value
    elif type(value) is dict:
        yield from value
        for each in value.values():
            yield from _strings(each)
    elif type(value) is list:
        for each in value:
            yield from _strings(each)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise BadLine(f"has the key {shown(twice)} twice in one object")
    return value


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise BadLine("holds a number that is too large for a float")
    return value


def _no_number(name: str) -> NoReturn:
    raise BadLine(f"not JSON: {name} is not a JSON number")


_decoder = json.JSONDecoder(object_pairs_hook=_unique, parse_float=_finite, parse_constant=_no_number)
