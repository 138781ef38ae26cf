"""The order of a parent to its child, which reaches the child as JSON in an environment variable."""

from __future__ import annotations

import json
import os
from dataclasses import astuple, dataclass

#: How a parent tells its child who it is. Not a setting of the user's.
ORDER_VARIABLE = "_BATCHMILL_CHILD"


@dataclass(frozen=True, slots=True)
class ChildOrder:
    """The process that a parent orders its child to be."""

    worker_id: int
    #: The canonical ModelSpec.
    spec: str
    #: The JSON of a Placement.
    placement: str
    #: The one job that it works for; None for all of its queue.
    only_job: str | None
    #: It takes no lock of its devices.
    share_device: bool
    #: The JSON of jobs.adapters.
    adapters: str | None
    #: The path of the Pulse that it beats.
    pulse: str
    #: The worker's log file.
    log_file: str
    parent_pid: int

    def to_environment(self) -> str:
        """The text of the environment variable."""
        return json.dumps(astuple(self))

    @classmethod
    def from_environment(cls) -> ChildOrder:
        """Reads the order of this process."""
        return cls(*json.loads(os.environ[ORDER_VARIABLE]))
