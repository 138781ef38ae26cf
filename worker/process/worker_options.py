"""The options of one worker, as its command line gives them to its parent process."""

from __future__ import annotations

from dataclasses import dataclass, field

from batchmill.jobs.models.adapters import Adapter
from batchmill.jobs.models.spec import ModelSpec
from batchmill.worker.devices.placement import Placement


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """The options that a worker was started with."""

    spec: ModelSpec
    placement: Placement = field(default_factory=Placement)
    name: str | None = None
    #: The one job that it serves; None for all of its queue.
    only_job: str | None = None
    exit_when_idle_seconds: float | None = None
    #: It takes no lock of its devices.
    share_device: bool = False
    #: LoRA adapters beside the model.
    adapters: tuple[Adapter, ...] = ()
