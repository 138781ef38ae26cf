"""Structured logs to stderr, and of a worker to its file, configured by entry points only.

Prompts, answers and secrets are never logged.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import structlog

from batchmill.jobs.runtime.log_file import LogFile

#: Name of the logger whose records go to the file alone, since the user is told the same in other words.
FILE_ONLY = "batchmill.jobs.runtime.logs.file"

#: Modules of errors whose own line says all: Celery and kombu add a stack when Redis is away.
_CONNECTION_MODULES = ("redis", "kombu")


def _without_stack(_logger: object, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Puts the error in place of the stack where another library logs a lost connection."""
    error = (event.get("exc_info") or (None, None, None))[1]
    if isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _CONNECTION_MODULES:
        del event["exc_info"]
        event["error"] = f"{type(error).__name__}: {error}"
    return event


def configure_logs(*, level: str, form: str, file: Path | None = None) -> None:
    """Sends every log line of this process, foreign ones too, to stderr and to this file.

    `form`: `console` or `json`.
    """
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    stderr = logging.StreamHandler(sys.stderr)
    stderr.setFormatter(_formatter(form, shared, colors=sys.stderr.isatty()))
    stderr.addFilter(lambda record: record.name != FILE_ONLY)
    handlers: list[logging.Handler] = [stderr]
    if file is not None:
        handlers.append(LogFile(file))
        handlers[-1].setFormatter(_formatter(form, shared, colors=False))
    logging.captureWarnings(True)
    root = logging.getLogger()
    root.handlers = handlers
    root.setLevel(level.upper())
    # The keeper logs a child that died in one line; Celery adds a traceback of its own pool.
    logging.getLogger("celery.worker.request").setLevel(logging.CRITICAL)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # says at its import which kernels it lacks
    for name in ("celery", "kombu", "amqp", "alembic", "filelock"):
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))


def _formatter(
    form: str, shared: Sequence[structlog.typing.Processor], *, colors: bool
) -> structlog.stdlib.ProcessorFormatter:
    if form == "json":
        renderers: list[structlog.typing.Processor] = [
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ]
    else:
        # A richer exception_formatter prints variables, so prompts.
        plain = structlog.dev.plain_traceback
        renderers = [structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=plain)]
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[_without_stack, *shared],
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderers],
    )


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """A module's logger; bind job, batch and worker ids to it."""
    logger: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger(name)
    return logger
