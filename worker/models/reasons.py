"""Explains in one line why a model could not be loaded, and what to do, from the errors of three libraries.

worker.models.hub.errors explains those of the Hub.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version

from batchmill.worker.devices.selection import is_out_of_memory

#: Characters of a foreign error's first line that are shown.
_ERROR_LENGTH = 300


def reason(error: Exception) -> str:
    """Explains an error in one line, and says what to do."""
    if any(is_out_of_memory(each) for each in _chain(error)):
        return "the device has not enough memory for it; use -q nf4, a smaller model or a larger device"
    text = str(error)
    for words, explanation in _EXPLANATIONS:
        if words in text:
            return explanation
    first = next((line for line in text.splitlines() if line.strip()), "no message")
    return f"{type(error).__name__}: {first.strip()[:_ERROR_LENGTH]}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


_EXPLANATIONS = (
    ("trust_remote_code", "it needs code of its own, which is never run; choose a model that transformers knows"),
    (
        "does not recognize this architecture",
        f"transformers {version('transformers')} does not know its architecture; install a newer one",
    ),
    ("Unrecognized configuration class", "it is no model that continues a text; choose a causal language model"),
)
