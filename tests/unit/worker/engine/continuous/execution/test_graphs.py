"""Graphs of decode steps, captured and replayed by a stand-in for the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from structlog.testing import capture_logs

from batchmill.worker.engine.continuous.execution.graphs import DecodeGraphs, row_counts
from tests.support.models.recorded_cuda import RecordedCuda

CPU = torch.device("cpu")
VOCABULARY, SIZE = 11, 6


class Model:
    """Logits of tokens and positions, by two products; it notes each forward."""

    def __init__(self, cuda: RecordedCuda) -> None:
        generator = torch.Generator().manual_seed(1)
        self._cuda = cuda
        self._embeddings = torch.randn(VOCABULARY, SIZE, generator=generator)
        self._head = torch.randn(SIZE, VOCABULARY, generator=generator)
        self.asks = False

    def __call__(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        self._cuda.note(f"forward of {tokens.shape[1]}")
        hidden = self._embeddings[tokens[0]] * (1 + positions[0][:, None])
        if self.asks and bool(hidden.sum() > 0):
            hidden = hidden + 1
        return torch.tanh(hidden) @ self._head


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> RecordedCuda:
    recorded = RecordedCuda()
    recorded.install(monkeypatch)
    return recorded


@pytest.fixture
def model(cuda: RecordedCuda) -> Model:
    return Model(cuda)


def step(rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens, positions = (torch.randint(VOCABULARY, (1, rows), generator=generator) for _ in range(2))
    return tokens, positions


def test_a_replay_gives_what_a_forward_gives(model: Model) -> None:
    graphs = DecodeGraphs(model, rows=8, device=CPU)
    for seed, rows in enumerate([4, 4, 8, 4, 8, 1, 4]):
        assert graphs.padded(rows) == rows
        given = step(rows, seed)
        torch.testing.assert_close(graphs.run(*given), model(*given))


def test_each_number_of_rows_is_captured_once_after_warm_ups_beside(model: Model, cuda: RecordedCuda) -> None:
    graphs = DecodeGraphs(model, rows=4, device=CPU)
    for seed in range(2):
        graphs.run(*step(2, seed))
    assert cuda.calls == [
        "side waits for main",
        "forward of 2 on side",
        "forward of 2 on side",
        "main waits for side",
        "forward of 2 on capture",
        "replay",
        "replay",
    ]
    graphs.run(*step(4, 2))
    assert cuda.pools == ["pool", "pool"]


def test_a_model_that_asks_the_device_runs_without_graphs(model: Model, cuda: RecordedCuda) -> None:
    graphs = DecodeGraphs(model, rows=8, device=CPU)
    model.asks = True
    with capture_logs() as said:
        for seed, rows in enumerate([3, 3]):
            given = step(graphs.padded(rows), seed)
            torch.testing.assert_close(graphs.run(*given), model(*given))
    assert [line["because"] for line in said] == ["operation not permitted when stream is capturing"]
    assert graphs.padded(3) == 3
    assert "replay" not in cuda.calls
    cuda.note("the next")
    assert cuda.calls[-1] == "the next on main", "a capture that failed leaves no stream of its own behind"


@pytest.mark.parametrize("most", [1, 3, 8, 63, 64, 65, 200, 256])
def test_any_step_finds_a_graph_that_is_little_larger(most: int) -> None:
    counts = row_counts(most)
    assert counts == sorted(set(counts))
    assert counts[-1] == most
    for rows in range(1, most + 1):
        padded = next(count for count in counts if count >= rows)
        assert padded - rows < max(4, 8 if rows < 64 else 32)


def test_memory_is_written_in_place(model: Model) -> None:
    """The logits of every graph are one tensor, which the next run overwrites."""
    graphs = DecodeGraphs(model, rows=8, device=CPU)
    seen: list[Any] = [graphs.run(*step(rows, rows)).data_ptr() for rows in (8, 4, 1)]
    assert len(set(seen)) == 1
