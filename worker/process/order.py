"""The order of a parent to its child, which reaches the child as JSON in an environment variable.

An order is written by name and says its form, since a child may be of another batchmill than the parent that lives on:
the package may be installed anew meanwhile. A child reads the orders of older parents and refuses those of newer ones.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from typing import Any

#: The variable by which a parent tells its child who it is. Not a setting of the user's.
ORDER_VARIABLE = "_BATCHMILL_CHILD"
#: Form 1 was a list of the values in this order.
_FORM = 2
_FORM_1 = (
    "worker_id",
    "spec",
    "placement",
    "only_job",
    "share_device",
    "adapters",
    "pulse",
    "log_file",
    "parent_pid",
)


class ForeignOrder(Exception):
    """An order of another batchmill, which this one cannot follow; the text is for the worker's user."""

    def __init__(self, worker_id: int, parent_pid: int) -> None:
        super().__init__(
            "batchmill was installed anew while this worker ran, and its new processes cannot go on with the old one: "
            "start the worker again"
        )
        self.worker_id = worker_id
        self.parent_pid = parent_pid


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
        return json.dumps({"form": _FORM, **asdict(self)})

    @classmethod
    def from_environment(cls) -> ChildOrder:
        """Reads the order of this process. Raises ForeignOrder."""
        written = json.loads(os.environ[ORDER_VARIABLE])
        fields: dict[str, Any] = dict(zip(_FORM_1, written, strict=False)) if isinstance(written, list) else written
        form = fields.pop("form", 1)
        if form > _FORM or fields.keys() != set(_FORM_1):
            # Every form names the worker, and all but the oldest lists its parent.
            raise ForeignOrder(fields["worker_id"], fields.get("parent_pid", os.getppid()))
        return cls(**fields)
