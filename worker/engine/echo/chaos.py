"""The echo engine that obeys magic prompts, to try batchmill's handling of bad prompts. For trials alone.

A prompt that begins with `!kill9` or `!segv` ends the process, `!sticky` breaks the engine until the process ends,
`!hang` never comes back, `!slow` takes twenty steps' time, and `!oom>k` does not fit beside k or more others.
"""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Mapping

from batchmill.jobs.requests.generation import GenerationRequest
from batchmill.jobs.requests.request import ErrorCode, Output, RequestKey
from batchmill.worker.engine.echo.engine import SLICE_SECONDS, EchoEngine, prompt_of

_OUT_OF_MEMORY = re.compile(r"!oom>(\d+)")
_SLOW_STEPS = 20
_SLOW_SECONDS = 1.0


class ChaosEngine(EchoEngine):
    """An echo engine for which prompts are orders."""

    _broken = False

    def _answer(self, batch: Mapping[RequestKey, GenerationRequest]) -> list[Output]:
        """Obeys or answers each request; returns nothing when this step was too large for the device."""
        for key, request in batch.items():
            self._obey(prompt_of(request))
            limit = _OUT_OF_MEMORY.match(prompt_of(request))
            if limit and len(batch) > max(1, int(limit[1])):
                self.capacity.too_much(len(batch))
                return []
            if limit and limit[1] == "0":
                self.cancel([key])
                return [Output.failed(key, ErrorCode.OUT_OF_MEMORY, "the device has not enough memory for it alone")]
        return super()._answer(batch)

    def _obey(self, prompt: str) -> None:
        if prompt.startswith("!kill9"):
            os.kill(os.getpid(), signal.SIGKILL)
        if prompt.startswith("!segv"):
            os.kill(os.getpid(), signal.SIGSEGV)
        if prompt.startswith("!hang"):
            threading.Event().wait()
        if prompt.startswith("!slow"):
            self._pass(max(_SLOW_SECONDS, _SLOW_STEPS * self._seconds_per_step))
        if prompt.startswith("!sticky") or self._broken:
            self._broken = True
            raise RuntimeError("CUDA error: device-side assert triggered (by a magic prompt)")

    def _pass(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self._progress():
            time.sleep(SLICE_SECONDS)
