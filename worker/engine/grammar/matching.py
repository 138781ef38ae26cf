"""Matchers for requests that have a response_format, made by a thread beside the device.

Owns the requests whose grammars are being compiled: most take a millisecond, and hostile ones seconds, in which the
rows that run go on. `grammars` compiles them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from batchmill.jobs.requests.request import RequestKey
from batchmill.worker.engine.grammar.grammars import Grammars, Matcher
from batchmill.worker.engine.text.tokenization import Prompt

Matchers = Future[list[Matcher]]


class Matching:
    """Requests between their arrival and the matchers of their choices."""

    def __init__(self, grammars: Grammars) -> None:
        self._grammars = grammars
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._compiling: dict[RequestKey, tuple[Prompt, Matchers]] = {}

    def __len__(self) -> int:
        return len(self._compiling)

    def add(self, key: RequestKey, prompt: Prompt) -> None:
        """Takes a request that has a response_format."""
        self._compiling[key] = prompt, self._thread.submit(self._made, prompt)

    def cancel(self, keys: Collection[RequestKey]) -> None:
        """Forgets these requests; unknown keys are ignored."""
        for key in keys:
            if key in self._compiling:
                _, matchers = self._compiling.pop(key)
                matchers.cancel()

    def ready(self, *, seconds: float) -> Iterator[tuple[RequestKey, Prompt, Matchers]]:
        """Waits up to `seconds` for a request that is done. Yields all that are, in order; a result may be Refused."""
        if not self._compiling:
            return
        wait([matchers for _, matchers in self._compiling.values()], seconds, FIRST_COMPLETED)
        for key, (prompt, matchers) in list(self._compiling.items()):
            if matchers.done():
                del self._compiling[key]
                yield key, prompt, matchers

    def close(self) -> None:
        """Ends the thread, after the grammar that it compiles."""
        self._thread.shutdown(cancel_futures=True)

    def _made(self, prompt: Prompt) -> list[Matcher]:
        assert prompt.sampling.response_format is not None, "only such requests are added"
        return [self._grammars.matcher(prompt.sampling.response_format) for _ in range(prompt.sampling.n or 1)]
