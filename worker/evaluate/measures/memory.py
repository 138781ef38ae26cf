"""The peak of a device's memory that one model takes, and the return of that memory.

On CUDA it is what torch allocated, and no short peak is missed. On a CPU it is the growth of this process's resident
bytes, read a hundred times a second.
"""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from batchmill.worker.devices.memory import MemoryReader

_READ_SECONDS = 0.01


class PeakMemory:
    """A meter whose `peak_bytes` is the largest growth while it was watching, since it was made."""

    def __init__(self, torch_device: str) -> None:
        self._cuda = torch.cuda if torch_device.startswith("cuda") else None
        self._device = torch_device
        self._reader = MemoryReader(torch_device)
        self._before = self._largest = self._reader.read().allocated

    @property
    def peak_bytes(self) -> int:
        return self._largest - self._before

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watches the memory within the block."""
        if self._cuda is not None:
            self._cuda.reset_peak_memory_stats(self._device)
            yield
            self._largest = max(self._largest, self._cuda.max_memory_allocated(self._device))
            return
        over = threading.Event()
        thread = threading.Thread(target=self._read_until, args=[over], name="memory", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _read_until(self, over: threading.Event) -> None:
        while not over.wait(_READ_SECONDS):
            self._largest = max(self._largest, self._reader.read().allocated)


def give_back() -> None:
    """Returns the memory of a model that was just dropped to the device and to the system."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    # glibc keeps freed memory for itself, and would count it to the next model.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
