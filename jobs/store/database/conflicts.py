"""Conflicts between transactions: one that PostgreSQL ended for another's sake is retried, with a short backoff."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from batchmill.jobs.errors import StoreConflict

#: A transaction is tried so often at most: by then the store is too busy for it.
MOST_TRIES = 6
#: The longest pause before the second try; each further one may be twice as long, so that two do not meet again.
_PAUSE_SECONDS = 0.02

P = ParamSpec("P")
T = TypeVar("T")


def retried(transaction: Callable[P, T]) -> Callable[P, T]:
    """Retries a method of the store where it lost a conflict, which leaves nothing of what it did.

    For a method that is one transaction, or that may be cut short and called again. Every method that writes is.
    """

    @wraps(transaction)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        for tries in range(MOST_TRIES - 1):
            try:
                return transaction(*args, **kwargs)
            except StoreConflict:
                time.sleep(random.uniform(0, _PAUSE_SECONDS * 2**tries))
        return transaction(*args, **kwargs)

    return run
