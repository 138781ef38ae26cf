"""The loop that drives the engine: top up, step, hand the outputs to the saver. It names no tensor and no SQL."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from time import monotonic

from batchmill.jobs.runtime.failpoints import failpoint
from batchmill.jobs.runtime.logs import get_logger
from batchmill.worker.engine import Engine
from batchmill.worker.loop.saver import Saver

log = get_logger(__name__)


class Runner:
    """Drives the engine while there is work. `watching` arms the watchdog around a step.

    `is_whole`: true while the model is the one that was loaded; if not, the saver drains.
    """

    def __init__(
        self,
        engine: Engine,
        saver: Saver,
        *,
        watching: Callable[[], AbstractContextManager[None]],
        is_whole: Callable[[], bool] = lambda: True,
    ) -> None:
        self._engine = engine
        self._saver = saver
        self._watching = watching
        self._is_whole = is_whole

    def run(self) -> None:
        """Runs one task: until the engine is empty and nothing that it may claim is pending, or until drain."""
        engine = self._engine
        begin, in_steps_seconds = monotonic(), 0.0
        self._saver.open()
        while (work := self._saver.take(waiting=engine.waiting, active=engine.active)) is not None:
            engine.cancel(work.forget)
            for key, request in work.add:
                engine.add(key, request)
            failpoint("child.entered")
            if engine.waiting or engine.active:
                step_begin = monotonic()
                with self._watching():
                    outputs = engine.step()
                in_steps_seconds += monotonic() - step_begin
                failpoint("child.stepped")
                if outputs and not self._is_whole():
                    continue  # nobody knows which model they are of; their requests are handed back
                self._saver.give(outputs, known_capacity=engine.capacity.found, tokens=engine.tokens_so_far)
        if in_steps_seconds:
            seconds = monotonic() - begin
            log.info("out of work", seconds=round(seconds, 3), in_steps_share=round(in_steps_seconds / seconds, 4))
