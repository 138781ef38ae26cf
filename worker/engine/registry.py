"""Finds the kind of engine that serves a model. It imports the libraries of that kind, and no others."""

from __future__ import annotations

from batchmill.jobs.configuration.settings import Settings
from batchmill.jobs.models.spec import ECHO, ModelSpec
from batchmill.worker.engine import EngineKind


def kind_of(spec: ModelSpec, settings: Settings) -> EngineKind:
    """The kind that opens this model; it takes seconds to import where it needs torch."""
    if spec.model == ECHO:
        from batchmill.worker.engine.echo.kind import EchoKind

        return EchoKind(step_seconds=settings.echo_step_seconds, chaos=settings.chaos)
    from batchmill.worker.models.quantization.uncompiled import import_bitsandbytes

    import_bitsandbytes()
    from batchmill.worker.engine.transformers_kind import TransformersKind

    return TransformersKind()
