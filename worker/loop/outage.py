"""The wait for a store that does not answer: it is told of, and the call is tried again until the store is back."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from batchmill.jobs.errors import StoreError
from batchmill.jobs.runtime.logs import get_logger

log = get_logger(__name__)
T = TypeVar("T")
_PAUSE_SECONDS = 1.0


def outlast(call: Callable[[], T], *, kind: type[StoreError] = StoreError) -> T:
    """Calls the store until it answers, and returns the result.

    Raises errors that another try cannot mend, and those of another kind.
    """
    began = time.monotonic()
    while True:
        try:
            return call()
        except kind as error:
            if not error.retryable:
                raise
            waited = round(time.monotonic() - began, 1)
            log.warning(f"{error.hindrance}; this process waits for it", error=str(error), waited_seconds=waited)
            time.sleep(_PAUSE_SECONDS)
