"""Sizes of memory as people write and read them: `24GiB`, `1.5 GiB`."""

from __future__ import annotations

import re

from batchmill.jobs.errors import UsageError

_KIB = 1024.0
_UNITS = {
    "B": 1,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}
_WRITTEN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*")


def size(number: float) -> str:
    """Bytes for people, in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < _KIB:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= _KIB
    return f"{number:.1f} TiB"


def bytes_of(text: str) -> int:
    """The bytes of `24GiB` or `24 GB`. Raises UsageError, since a number alone says nothing."""
    written = _WRITTEN.fullmatch(text)
    factor = _UNITS.get(written[2].upper()) if written else None
    if written is None or factor is None or not float(written[1]):
        raise UsageError(f"{text!r} is no size of memory; write it with its unit, such as 24GiB or 900MB")
    return int(float(written[1]) * factor)
