"""The loop that drives the engine: top up, step, hand the outputs to the saver. It names no tensor and no SQL."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from time import monotonic

from jobs.failpoints import failpoint
from jobs.logs import get_logger
from worker.engine import Engine
from worker.saver import Saver

log = get_logger(__name__)


class Runner:
    """Runs one task: works while there is work. `watching` arms the watchdog around a step."""

    def __init__(self, engine: Engine, saver: Saver, *, watching: Callable[[], AbstractContextManager[None]]) -> None:
        self._engine = engine
        self._saver = saver
        self._watching = watching

    def run(self) -> None:
        """Ends when the engine is empty and nothing that it may claim is pending, or on drain."""
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
                self._saver.give(outputs, fits=engine.capacity.found)
        if in_steps_seconds:
            seconds = monotonic() - begin
            log.info("out of work", seconds=round(seconds, 3), in_steps_share=round(in_steps_seconds / seconds, 4))
