"""CUDA graphs of the decode step: the launches of a whole forward replayed as one.

Owns the captured graphs and the tensors that they read. A graph has one number of rows; a step runs in the next
larger one, with padding rows behind its own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from batchmill.jobs.runtime.logs import get_logger

log = get_logger(__name__)
#: Takes tokens and positions (1, rows), and gives logits (rows, vocabulary).
Forward = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
_WARM_UPS = 2


def row_counts(most: int) -> list[int]:
    """The sizes that are captured: close together where a row more costs most."""
    small = [count for count in (1, 2, 4) if count < most]
    return [*small, *range(8, min(most, 64), 8), *range(64, most, 32), most]


class DecodeGraphs:
    """Graphs of `forward` for up to `rows` rows, each captured when it is first needed.

    A model that cannot be captured (one that asks the device something in its forward) is run without.
    """

    def __init__(self, forward: Forward, *, rows: int, device: torch.device) -> None:
        self._forward = forward
        self._counts = row_counts(rows)
        self._tokens = torch.zeros((1, rows), dtype=torch.long, device=device)
        self._positions = torch.zeros((1, rows), dtype=torch.long, device=device)
        #: The logits that the graphs write: one tensor for all, since each would keep its own.
        self._logits: torch.Tensor | None = None
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._refused = False

    def padded(self, rows: int) -> int:
        """Returns the number of rows that a step of so many is padded to."""
        return rows if self._refused else next(count for count in self._counts if count >= rows)

    def run(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Takes tokens and positions (1, rows) of `padded` rows.

        Returns their logits (rows, vocabulary), which hold until the next run.
        """
        rows = tokens.shape[1]
        self._tokens[:, :rows].copy_(tokens)
        self._positions[:, :rows].copy_(positions)
        if not self._refused and rows not in self._graphs:
            self._capture(rows)
        if self._refused:
            return self._computed(rows)
        self._graphs[rows].replay()
        return self._written(rows)

    def _computed(self, rows: int) -> torch.Tensor:
        return self._forward(self._tokens[:, :rows], self._positions[:, :rows])

    def _written(self, rows: int) -> torch.Tensor:
        assert self._logits is not None, "a graph was captured"
        return self._logits[:rows]

    def _capture(self, rows: int) -> None:
        side: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                logits = self._computed(rows)
        torch.cuda.current_stream().wait_stream(side)
        if self._logits is None:
            self._logits = logits.new_empty((self._tokens.shape[1], logits.shape[1]))
        try:
            self._graphs[rows] = self._recorded(rows)
        except RuntimeError as error:
            self._refused = True
            self._graphs.clear()
            # Ending a capture that failed fails as well, with less to say.
            because = str(error.__context__ or error)
            log.warning("decode steps are not captured as CUDA graphs", because=because.partition("\n")[0])

    def _recorded(self, rows: int) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # A capture that fails leaves its own stream behind as the current one, so this one is returned to. What another
        # thread asks the device meanwhile (how much memory is free) is no part of it, and no reason to fail.
        here = torch.cuda.stream(torch.cuda.current_stream())
        with here, torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            self._written(rows).copy_(self._computed(rows))
        return graph
