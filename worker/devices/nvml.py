"""NVML's figures for a GPU as a whole: the memory that all processes hold there, and the energy that it took.

NVML comes with the driver; the library that asks it (nvidia-ml-py, imported as pynvml) is an extra of its own. Without
either, without the right to ask, or for a part of a GPU that cannot tell, a figure is None. This module knows no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Nvml:
    """Asks the library `pynvml`, after `nvmlInit` succeeded. GPUs are named by their UUID."""

    def __init__(self, library: Any) -> None:
        self._library = library

    @classmethod
    def open(cls) -> Nvml | None:
        """Opens NVML; None without the library, without a driver, and where NVML may not be asked."""
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
        """Bytes that all processes hold on this GPU together."""
        used = self._asked(lambda: self._library.nvmlDeviceGetMemoryInfo(self._handle(uuid)).used)
        return None if used is None else int(used)

    def energy_joules(self, uuid: str) -> float | None:
        """Joules that this GPU took since its driver was loaded."""
        millijoules = self._asked(lambda: self._library.nvmlDeviceGetTotalEnergyConsumption(self._handle(uuid)))
        return None if millijoules is None else millijoules / 1_000

    def _handle(self, uuid: str) -> Any:
        return self._library.nvmlDeviceGetHandleByUUID(uuid)

    def _asked(self, question: Callable[[], Any]) -> Any:
        """Returns the answer, or None: a shared GPU or an old driver cannot answer every question."""
        try:
            return question()
        except self._library.NVMLError:
            return None
