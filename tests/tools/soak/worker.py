"""The real `worker` command with a spy in it: how much each of its processes generated, and under which host's name.

`python -m tests.tools.soak.worker -m echo --name w1`. The process that holds the model counts into a file of its own
what its engine answered, and what of it was dropped on purpose; a killed process leaves its last counts there. With
SOAK_HOST the worker takes itself to be on another host; `-q nf4` gives echo a second queue, whose jobs others do not
see.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchmill.jobs.runtime.process.signals import exit_on_sigterm

#: The folder of the counts, and the worker's host name. No settings of batchmill's.
COUNTS_VARIABLE, HOST_VARIABLE = "SOAK_COUNTS", "SOAK_HOST"
_FORMAT = struct.Struct("<5q")


@dataclass(slots=True)
class Counts:
    """The outputs that one child process generated."""

    worker_id: int = 0
    generation: int = 0
    generated: int = 0
    #: Outputs of cancelled jobs and the like.
    dropped: int = 0
    #: Outputs whose lease had been taken.
    lost: int = 0

    def pack(self) -> bytes:
        return _FORMAT.pack(self.worker_id, self.generation, self.generated, self.dropped, self.lost)


def read_counts(folder: Path) -> list[Counts]:
    """Reads the counts of every child process; those that ended before they had a generation are left out."""
    found = (path.read_bytes() for path in folder.iterdir())
    return [Counts(*_FORMAT.unpack(data)) for data in found if len(data) == _FORMAT.size]


class _Spy:
    """Counts in this process, and writes the counts down at each change."""

    def __init__(self, folder: Path) -> None:
        self.counts = Counts()
        name = folder / f"{os.getpid()}-{time.monotonic_ns()}"
        self._descriptor = os.open(name, os.O_CREAT | os.O_WRONLY, 0o600)

    def write(self) -> None:
        os.pwrite(self._descriptor, self.counts.pack(), 0)


def _watch_generation(spy: _Spy) -> None:
    from batchmill.jobs.store.workers.registration import Registration

    new_generation = Registration.new_generation

    def noted(self: Registration, worker_id: int, *, child_pid: int) -> int:
        spy.counts.worker_id = worker_id
        spy.counts.generation = new_generation(self, worker_id, child_pid=child_pid)
        spy.write()
        return spy.counts.generation

    Registration.new_generation = noted  # type: ignore[method-assign]


def _watch_engine(spy: _Spy) -> None:
    from batchmill.worker.engine.echo.engine import EchoEngine

    answer = EchoEngine._answer

    def counted(self: EchoEngine, batch: Mapping[Any, Any]) -> list[Any]:
        outputs = answer(self, batch)
        spy.counts.generated += len(outputs)
        spy.write()
        return outputs

    EchoEngine._answer = counted  # type: ignore[method-assign]


def _watch_holdings(spy: _Spy) -> None:
    from batchmill.worker.loop.holdings import Holdings

    answer, absorb = Holdings.answer, Holdings.absorb

    def answered(self: Holdings, outputs: Iterable[Any]) -> None:
        given = list(outputs)
        spy.counts.dropped += sum(output.key not in self._batch_of for output in given)
        answer(self, given)
        spy.write()

    def absorbed(self: Holdings, said: Any, turned: Any) -> list[Any]:
        said_of = {each.lease.batch_id: len(each.outputs) for each in said.reports}
        spy.counts.lost += _unsaved(self, turned.lost, {})
        spy.counts.dropped += _unsaved(self, turned.finished | turned.cancelled | turned.released, said_of)
        spy.write()
        return absorb(self, said, turned)

    Holdings.answer, Holdings.absorb = answered, absorbed  # type: ignore[method-assign]


def _unsaved(holdings: Any, batch_ids: Collection[int], said_of: Mapping[int, int]) -> int:
    """Answers of these batches that no turn has said."""
    held = ((each, holdings._by_batch.get(each)) for each in batch_ids)
    return sum(len(holding.answered) - said_of.get(each, 0) for each, holding in held if holding is not None)


def spy_on_this_process() -> None:
    spy = _Spy(Path(os.environ[COUNTS_VARIABLE]))
    for watch in (_watch_generation, _watch_engine, _watch_holdings):
        watch(spy)


def let_echo_have_twins() -> None:
    """Lets `-m echo` take a quantization, which gives it a queue of its own."""
    from batchmill.jobs.models import spec

    spec._quantization_of = lambda _model, written, _default: spec.Quantization.parse(written or "none")


def move_to_other_host() -> None:
    if name := os.environ.get(HOST_VARIABLE):
        socket.gethostname = lambda: name


if __name__ == "__main__":
    exit_on_sigterm()  # as `python -m batchmill.worker` does, since the imports take a second
    move_to_other_host()
    let_echo_have_twins()
    from batchmill.worker.cli.worker import main

    main()
elif __name__ == "__mp_main__":  # the child, which imports its parent's main module
    move_to_other_host()
    spy_on_this_process()
