"""A stand-in for torch.cuda on a CPU: streams and events are recorded in order, and graphs replay what they captured.

A captured graph holds the operations of its block with their tensors, and runs them again over the same memory, as the
device would. What the device refuses in a capture (to wait for a number) is refused here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

_WAITS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}


@dataclass
class Stream:
    """A stream by its name; it notes what it waits for."""

    name: str
    calls: list[str]

    def wait_stream(self, other: Stream) -> None:
        self.calls.append(f"{self.name} waits for {other.name}")


@dataclass
class Graph:
    """The operations of one capture, with their arguments and results."""

    calls: list[str]
    operations: list[tuple[Any, Any, Any, Any]] = field(default_factory=list)

    def replay(self) -> None:
        self.calls.append("replay")
        for function, arguments, options, result in self.operations:
            again = function(*arguments, **options)
            if isinstance(result, torch.Tensor) and again is not result and again.data_ptr() != result.data_ptr():
                result.copy_(again)


class _Capture(TorchDispatchMode):
    """Notes the operations of a block in a graph."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self._graph = graph

    def __torch_dispatch__(self, function: Any, _types: Any, arguments: Any = (), options: Any = None) -> Any:
        if function in _WAITS:
            raise RuntimeError("operation not permitted when stream is capturing")
        result = function(*arguments, **(options or {}))
        self._graph.operations.append((function, arguments, options or {}, result))
        return result


class RecordedCuda:
    """The calls of torch.cuda, in order."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.pools: list[object] = []
        self._current = Stream("main", self.calls)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Takes the place of torch.cuda's functions for one test."""
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
        monkeypatch.setattr(torch.cuda, "Stream", lambda: Stream("side", self.calls))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self._current)
        monkeypatch.setattr(torch.cuda, "stream", self._on)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: Graph(self.calls))
        monkeypatch.setattr(torch.cuda, "graph", self._captured)

    def note(self, what: str) -> None:
        """Notes what a test's own function does, and on which stream."""
        self.calls.append(f"{what} on {self._current.name}")

    @contextmanager
    def _on(self, stream: Stream) -> Iterator[None]:
        before, self._current = self._current, stream
        try:
            yield
        finally:
            self._current = before

    @contextmanager
    def _captured(self, graph: Graph, *, pool: object, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        self.pools.append(pool)
        before, self._current = self._current, Stream("capture", self.calls)
        with _Capture(graph):  # a capture that fails leaves its own stream behind
            yield
        self._current = before
