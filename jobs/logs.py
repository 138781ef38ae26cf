"""Structured logs to stderr, configured by entry points only. Prompts, answers and secrets are never logged."""

from __future__ import annotations

import logging
import sys

import structlog

from jobs.settings import Settings

#: Of what Celery and kombu tell of a Redis that is away, the error's own line says all.
_CONNECTION_MODULES = ("redis", "kombu")


def _without_stack(_logger: object, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """A lost connection that another library logs, with its error in place of the stack."""
    error = (event.get("exc_info") or (None, None, None))[1]
    if isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _CONNECTION_MODULES:
        del event["exc_info"]
        event["error"] = f"{type(error).__name__}: {error}"
    return event


def configure_logs(settings: Settings) -> None:
    """Sends every log line of this process, foreign ones too, to stderr in one form."""
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
    if settings.log_format == "json":
        renderers: list[structlog.typing.Processor] = [
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ]
    else:
        # A richer exception_formatter prints variables, so prompts.
        plain = structlog.dev.plain_traceback
        renderers = [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=plain)]
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[_without_stack, *shared],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderers],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(settings.log_level.upper())
    # A child that died is told of by the keeper, in one line; Celery adds a traceback of its own pool.
    logging.getLogger("celery.worker.request").setLevel(logging.CRITICAL)
    for name in ("celery", "kombu", "amqp", "alembic", "filelock"):
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """A module's logger; bind job, batch and worker ids to it."""
    logger: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger(name)
    return logger
