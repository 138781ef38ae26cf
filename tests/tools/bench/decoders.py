"""The contestants of `decode`: batchmill's engine and transformers' two ways, each noting when every token came.

A run is one batch of rows of the same lengths. Workloads and scores are computed elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, ClassVar

from batchmill.jobs.models.quantization import Quantization
from batchmill.jobs.requests.request import RequestKey
from tests.tools.bench.contestant import Answers
from tests.tools.bench.engines import ContinuousContestant
from tests.tools.bench.peers.transformers import GenerateBatch, Setting, SortedGenerate
from tests.tools.bench.timeline import Timeline
from tests.tools.bench.workloads import Workload

#: The first run of a workload captures graphs and compiles kernels for its rows, so all of them warm up.
_ALL = 2**20
#: generate_batch reads the prompts in so many steps at most, so that few rows have ended when the last one begins.
_PROMPT_STEPS, _LEAST_STEP_TOKENS = 16, 512


def _meter(device: str) -> Any:
    from batchmill.worker.devices.memory import MemoryMeter
    from batchmill.worker.devices.selection import describe_devices

    return MemoryMeter(describe_devices((device,)))


class EngineDecoder(ContinuousContestant):
    """The continuous engine, step by step."""

    name: ClassVar[str] = "continuous"
    warm_up: ClassVar[int] = _ALL

    def load(self, folder: Path, weights: str, threads: int) -> None:
        self._meter = _meter(self.setup.device)
        self._four_bit = Quantization.parse(weights).four_bit
        super().load(folder, weights, threads)

    def ready(self, workload: Workload, setting: Any) -> None:
        super().ready(workload, setting)
        self._meter.take()

    def run(self, workload: Workload, setting: Any) -> Answers:
        engine = self._engine
        begin = perf_counter()
        for index, ask in enumerate(workload.asks):
            engine.add(RequestKey("bench", index), self._request(index, ask))
        rows = [engine._answers[RequestKey("bench", index)].rows[0] for index in range(len(workload.asks))]
        times: list[list[float]] = [[] for _ in rows]
        while engine.waiting or engine.active:
            engine.step()
            now = perf_counter() - begin
            self._meter.observe()
            for row, came in zip(rows, times, strict=True):
                came += [now] * (len(row.tokens) - row.prompt_tokens - len(came))
        return _answers(times, self._meter.take().peak_allocated_bytes, self._held(), self._notes())

    def _held(self) -> dict[str, int]:
        engine = self._engine
        weights, copies = engine._loaded.weights_bytes, engine.prepared.copied_bytes
        return {"weights": weights, "copies": copies, "cache": engine.cache_bytes}

    def _notes(self) -> dict[str, str]:
        prepared, graphs = self._engine.prepared, self._engine._decoder._graphs
        least, most = prepared.copy_rows
        copies = f"copies from {least} - {most} rows" if prepared.copied_bytes else "no copies"
        return {
            "dequantize": f"{self.setup.dequantize}: {copies}" if self._four_bit else "",
            "CUDA graphs": "yes" if graphs is not None and graphs._graphs else "no",
            "joined": str(prepared.joined),
        }


class GenerateDecoder(SortedGenerate):
    """All rows in one call."""

    name: ClassVar[str] = "transformers generate"
    warm_up: ClassVar[int] = _ALL

    def load(self, folder: Path, weights: str, threads: int) -> None:
        self._meter = _meter(self.setup.device)
        super().load(folder, weights, threads)

    def ready(self, workload: Workload, setting: Any) -> None:
        self._meter.take()

    def run(self, workload: Workload, setting: Any) -> Answers:
        watch = _Watch(self.setup.device, self._meter.observe)
        found = self._generate(workload, range(len(workload.asks)), watch=watch)
        seconds = watch.seconds()
        times = [seconds[: len(row)] for row in found]
        return _answers(times, self._meter.take().peak_allocated_bytes)


class GenerateBatchDecoder(GenerateBatch):
    """The manager behind `generate_batch`, with room for all rows at once."""

    name: ClassVar[str] = "transformers generate_batch"
    warm_up: ClassVar[int] = _ALL

    def load(self, folder: Path, weights: str, threads: int) -> None:
        self._meter = _meter(self.setup.device)
        super().load(folder, weights, threads)

    def settings(self, workload: Workload) -> Sequence[Any]:
        tokens = max(_LEAST_STEP_TOKENS, len(workload.asks), -(-workload.prompt_tokens // _PROMPT_STEPS))
        return [Setting(len(workload.asks), tokens)]

    def ready(self, workload: Workload, setting: Any) -> None:
        super().ready(workload, setting)
        self._meter.take()

    def run(self, workload: Workload, setting: Any) -> Answers:
        begin = perf_counter()
        times = [[time - begin for time in each.timestamps] for each in self.results(workload, record_timestamps=True)]
        self._meter.observe()
        return _answers(times, self._meter.take().peak_allocated_bytes)


class _Watch:
    """A stopping criterion that stops nothing and notes when it is called: on CUDA by the device's clock.

    Looking at the device's clock would make the host wait for every token, so it is read at the end.
    """

    def __init__(self, device: str, observe: Callable[[], None]) -> None:
        self._cuda, self._observe = device != "cpu", observe
        self._moments: list[Any] = []
        self._begin = self._now()

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        self._moments.append(self._now())
        self._observe()
        return input_ids.new_zeros(len(input_ids), dtype=bool)

    def seconds(self) -> list[float]:
        """From the begin to each call."""
        if not self._cuda:
            return [each - self._begin for each in self._moments]
        import torch

        torch.cuda.synchronize()
        return [self._begin.elapsed_time(each) / 1000 for each in self._moments]

    def _now(self) -> Any:
        if not self._cuda:
            return perf_counter()
        import torch

        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


def _answers(
    times: list[list[float]], peak_bytes: int, held: dict[str, int] | None = None, notes: dict[str, str] | None = None
) -> Answers:
    return Answers([len(each) for each in times], timeline=Timeline(times, peak_bytes, held or {}, notes or {}))
