"""What NVML says of a GPU as a whole: the memory that all processes hold there, and the energy that it took.

NVML comes with the driver, and the library that asks it (nvidia-ml-py, imported as pynvml) is an extra of its own: who
has neither, or no right to ask, or a part of a GPU that cannot tell, gets None. This module knows no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Nvml:
    """Asks the library `pynvml` that it is given, after `nvmlInit` succeeded. GPUs are named by their UUID."""

    def __init__(self, library: Any) -> None:
        self._library = library

    @classmethod
    def open(cls) -> Nvml | None:
        """None without the library, without a driver, and where NVML may not be asked."""
        try:
            import pynvml
        except ImportError:
            return None
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError:
            return None
        return cls(pynvml)

    def used_bytes(self, uuid: str) -> int | None:
        """What all processes hold on this GPU together."""
        found = self._asked(lambda: self._library.nvmlDeviceGetMemoryInfo(self._handle(uuid)).used)
        return None if found is None else int(found)

    def energy_joules(self, uuid: str) -> float | None:
        """What this GPU took since its driver was loaded."""
        found = self._asked(lambda: self._library.nvmlDeviceGetTotalEnergyConsumption(self._handle(uuid)))
        return None if found is None else found / 1_000

    def _handle(self, uuid: str) -> Any:
        return self._library.nvmlDeviceGetHandleByUUID(uuid)

    def _asked(self, question: Callable[[], Any]) -> Any:
        """The answer, or None: a GPU that is shared out, or a driver that is old, has not every one."""
        try:
            return question()
        except self._library.NVMLError:
            return None
