"""A child's pulse: memory in which it counts its progress, and leaves its last words, and which its parent reads.

Reading needs nothing of the child, so a hanging call that holds its interpreter is seen too. The memory is no file:
it takes no place on a disk, and is gone with the parent.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

_LAYOUT = struct.Struct("=qqd")


class Beat(NamedTuple):
    """One reading of a pulse."""

    #: The child that wrote it.
    pid: int
    #: Progress that it has counted.
    progress: int
    #: The longest that it may make no progress; 0 where it idles.
    limit_seconds: float


class Pulse:
    """Counts progress. Within `watching`, at most a given time may pass between two beats."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._memory = mmap.mmap(descriptor, _LAYOUT.size)
        #: The path at which another process of this user finds the same memory, as long as this one lives.
        self.path = f"/proc/{os.getpid()}/fd/{descriptor}"

    @classmethod
    def create(cls) -> Pulse:
        descriptor = os.memfd_create("batchmill-pulse")
        os.ftruncate(descriptor, _LAYOUT.size)
        return cls(descriptor)

    @classmethod
    def of(cls, path: str) -> Pulse:
        """The pulse that another process created; raises OSError where that is gone."""
        return cls(os.open(path, os.O_RDWR | os.O_CLOEXEC))

    def read(self) -> Beat:
        return Beat(*_LAYOUT.unpack_from(self._memory))

    def open_words(self) -> int:
        """The end of the memory as a descriptor, for what the child has to say though its interpreter is held."""
        return os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)

    def take_words(self) -> str:
        """Takes out what has been said there."""
        words = os.pread(self._descriptor, os.fstat(self._descriptor).st_size, _LAYOUT.size)
        os.ftruncate(self._descriptor, _LAYOUT.size)
        return words.decode(errors="replace")

    @contextmanager
    def watching(self, seconds: float) -> Iterator[None]:
        """Within the block there has to be progress at least so often."""
        self._write(seconds)
        try:
            yield
        finally:
            self._write(0.0)

    def beat(self) -> None:
        """Counts that there was progress."""
        self._write(self.read().limit_seconds)

    def _write(self, limit_seconds: float) -> None:
        _LAYOUT.pack_into(self._memory, 0, os.getpid(), self.read().progress + 1, limit_seconds)
