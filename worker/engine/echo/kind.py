"""Opens the echo engine, which has no model to load."""

from __future__ import annotations

from batchmill.jobs.models.engine_facts import EngineFacts
from batchmill.jobs.models.identity import of_echo
from batchmill.worker.engine import OpenEngine, Opening
from batchmill.worker.engine.echo.chaos import ChaosEngine
from batchmill.worker.engine.echo.engine import ECHO_ROWS, EchoEngine


class EchoKind:
    """The engine without a model; with `chaos` the one that obeys magic prompts."""

    def __init__(self, *, step_seconds: float, chaos: bool) -> None:
        self._step_seconds = step_seconds
        self._chaos = chaos

    def open(self, opening: Opening) -> OpenEngine:
        """Makes the engine, which holds every adapter by its name alone."""
        made = ChaosEngine if self._chaos else EchoEngine
        engine = made(
            rows=opening.options.max_rows or ECHO_ROWS,
            progress=opening.progress,
            seconds_per_step=self._step_seconds,
            known_capacity=opening.known_capacity,
            adapters=[each.name for each in opening.adapters],
        )
        facts = EngineFacts(engine.limits, of_echo().identity, adapters=tuple(opening.adapters), kinds=engine.kinds)
        return OpenEngine(engine, facts)
