"""The names of the Redis queues: one for each ModelSpec in each store."""

from __future__ import annotations

import hashlib
import re

from batchmill.jobs.models.spec import ModelSpec

QUEUE_NAME_LENGTH = 24


def queue_name(spec: ModelSpec, store_id: str) -> str:
    """The queue of this spec in one store: characters that are safe in Redis keys and patterns alone."""
    return _name(spec.model, f"{store_id} {spec.canonical}")


def old_queue_name(spec: ModelSpec) -> str:
    """The queue of this spec before each store had its own."""
    return _name(spec.model, spec.canonical)


def _name(model: str, digested: str) -> str:
    digest = hashlib.sha256(digested.encode()).hexdigest()[:12]
    name = re.sub(r"[^a-z0-9]+", "-", model.rsplit("/", 1)[-1].lower()).strip("-")
    return f"bm-{name[:QUEUE_NAME_LENGTH].strip('-') or 'model'}-{digest}"
