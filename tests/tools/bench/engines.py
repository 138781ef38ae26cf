"""batchmill's own engines as contestants, driven as the runner drives them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any, ClassVar

from batchmill.jobs.models.spec import ModelSpec
from batchmill.jobs.requests.generation import GenerationRequest, SamplingParams
from batchmill.jobs.requests.request import Output, RequestKey
from tests.tools.bench.contestant import Answers, Contestant
from tests.tools.bench.workloads import Ask, Workload

_ROWS = 64
#: The engine is given a quarter more than its rows, as the saver reads ahead; or all that there is.
AHEAD, AT_ONCE = "ahead", "at once"


class _Ours(Contestant):
    """`engine` makes the engine of a loaded model; it lives as long as the process."""

    formats: ClassVar[Mapping[str, str]] = {"nf4": "nf4", "int8": "int8", "none": "none"}
    environment: ClassVar[Mapping[str, str]] = {"OMP_WAIT_POLICY": "PASSIVE"}  # as a worker sets it
    ignore_eos: ClassVar[bool | None] = None
    feed: ClassVar[str] = AHEAD

    def load(self, folder: Path, weights: str, threads: int) -> None:
        import torch

        from batchmill.worker.models.load import load

        torch.set_num_threads(threads)
        loaded = load(ModelSpec.parse(str(folder), quantization=weights), self.setup.device)
        self._engine: Any = self.engine(replace(loaded, end_token_ids=()))

    def engine(self, loaded: Any) -> Any:
        raise NotImplementedError

    def run(self, workload: Workload, setting: Any) -> Answers:
        before = self._split()
        requests = [self._request(index, ask) for index, ask in enumerate(workload.asks)]
        outputs, step_seconds = drive(self._engine, requests, self.feed)
        split = {part: seconds - before.get(part, 0.0) for part, seconds in self._split().items()}
        if split:
            split["other"] = max(0.0, step_seconds - sum(split.values()))
        counts = {output.key.index: output.completion_tokens for output in outputs}
        return Answers([counts[index] for index in range(len(workload.asks))], split=split)

    def _request(self, index: int, ask: Ask) -> GenerationRequest:
        sampling = SamplingParams(max_tokens=ask.answer_tokens, temperature=0.0, ignore_eos=self.ignore_eos)
        return GenerationRequest(index, f"r{index}", prompt=ask.text, sampling=sampling)

    def _split(self) -> dict[str, float]:
        split: Callable[[], Mapping[str, float]] | None = getattr(self._engine, "split", None)
        return {} if split is None else dict(split())


def drive(engine: Any, requests: Sequence[GenerationRequest], feed: str) -> tuple[list[Output], float]:
    """The outputs of these requests, and the seconds within the engine."""
    ahead = deque(requests)
    outputs: list[Output] = []
    fill = len(requests) if feed == AT_ONCE else engine.limits.rows + engine.limits.rows // 4
    begin = perf_counter()
    while ahead or engine.waiting or engine.active:
        while ahead and engine.waiting < fill:
            request = ahead.popleft()
            engine.add(RequestKey("bench", request.index), request)
        outputs += engine.step()
    return outputs, perf_counter() - begin


class ContinuousContestant(_Ours):
    """The engine that is the default."""

    name: ClassVar[str] = "continuous"
    ignore_eos: ClassVar[bool | None] = True
    share_prefixes: ClassVar[bool] = True

    def ready(self, workload: Workload, setting: Any) -> None:
        """Another request takes out of the cache what the rows that ended last left there, to be shared again."""
        sampling = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
        drive(self._engine, [GenerationRequest(0, "forget", prompt="a", sampling=sampling)], AT_ONCE)

    def engine(self, loaded: Any) -> Any:
        from batchmill.worker.engine.continuous.engine import ContinuousEngine
        from batchmill.worker.engine.options import Dequantize, EngineOptions

        options = EngineOptions(
            max_rows=self.setup.rows,
            context_tokens=self.setup.context_tokens,
            dequantize=Dequantize(self.setup.dequantize),
        )
        return ContinuousEngine(loaded, options=options, share_prefixes=self.share_prefixes)


class UnsharedContestant(ContinuousContestant):
    name: ClassVar[str] = "continuous, prefixes not shared"
    share_prefixes: ClassVar[bool] = False


class AtOnceContestant(ContinuousContestant):
    """The continuous engine with all requests at once: the gain of a longer read-ahead."""

    name: ClassVar[str] = "continuous, all requests at once"
    feed: ClassVar[str] = AT_ONCE


class GenerateContestant(_Ours):
    """The engine for models that the continuous one cannot serve."""

    name: ClassVar[str] = "generate engine"

    def engine(self, loaded: Any) -> Any:
        from batchmill.worker.engine.generate.engine import GenerateEngine
        from batchmill.worker.engine.options import EngineOptions

        return GenerateEngine(loaded, options=EngineOptions(max_rows=_ROWS))
