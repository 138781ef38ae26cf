"""The command that starts a worker for a model, as it works on this machine without a change.

The embedded Redis comes with a mill: the command is `up` while there is none, and `worker` beside one, since a second
`up` is refused. With a Redis of one's own it is `worker`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from batchmill.jobs.configuration.settings import Settings
from batchmill.jobs.models.spec import ModelSpec
from batchmill.jobs.runtime.home import socket_path
from batchmill.jobs.runtime.process.pid_file import PidFile
from batchmill.jobs.runtime.process.process import Lives


def start_verb(settings: Settings) -> str:
    """`up` or `worker`."""
    brings_its_own = settings.embedded_broker and settings.embedded_store
    return "up" if brings_its_own and not mill_lives(settings.home) else "worker"


def start_words(spec: ModelSpec, settings: Settings, *, adapters: Sequence[str] = ()) -> list[str]:
    """The words of that command for a model and adapters, each as `--adapter` takes it."""
    named = [word for each in adapters for word in ("--adapter", each)]
    return ["batchmill", start_verb(settings), *spec.command_line()[2:], *named]


def mill_starts_workers(settings: Settings) -> bool:
    """True where a `run` or `up` of this home certainly lives, which has yet to start a worker that is missing."""
    return settings.embedded_broker and settings.embedded_store and _mill(settings.home).lives is Lives.YES


def mill_starts(spec: ModelSpec, settings: Settings, *, job_id: str) -> bool:
    """True where such a mill serves this job's model, or has not yet started the worker whose command line tells."""
    if not mill_starts_workers(settings):
        return False
    words = PidFile(settings.home / "worker.pid").command_line
    only_job = words[words.index("--job") + 1] if "--job" in words[:-1] else job_id
    wanted = spec.command_line()[2:]
    begins = [place for place in range(len(words)) if words[place : place + len(wanted)] == wanted]
    return not words or (bool(begins) and only_job == job_id)


def mill_lives(home: Path) -> bool:
    """True where a `run` or `up` of this home lives; where the system cannot tell, where its Redis listens."""
    lives = _mill(home).lives
    return lives is Lives.YES or (lives is Lives.UNKNOWN and socket_path(home).exists())


def _mill(home: Path) -> PidFile:
    return PidFile(home / "mill.pid")
