"""transformers' own ways to generate, as contestants: `generate` by batches or one by one, and `generate_batch`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from batchmill.jobs.models.spec import ModelSpec
from tests.tools.bench.contestant import EXACT, Answers, Contestant, longest_first
from tests.tools.bench.workloads import Workload

_ROWS = 16
_PAGE_TOKENS = 32


class _Transformers(Contestant):
    formats: ClassVar[Mapping[str, str]] = {"nf4": "nf4", "int8": "int8", "none": "none", EXACT: "none"}
    environment: ClassVar[Mapping[str, str]] = {"OMP_WAIT_POLICY": "PASSIVE"}  # as a worker sets it

    def load(self, folder: Path, weights: str, threads: int) -> None:
        import torch

        from batchmill.worker.models.load import load

        torch.set_num_threads(threads)
        loaded = load(ModelSpec.parse(str(folder), quantization=weights), self.setup.device)
        self._model: Any = loaded.model
        self._pad = loaded.pad_token_id


class SortedGenerate(_Transformers):
    """Batches of 16 requests of similar prompts. A row that has ended is stepped on until the longest has."""

    name: ClassVar[str] = "transformers generate, batches of 16 by prompt length"

    def order(self, workload: Workload) -> list[int]:
        return sorted(range(len(workload.asks)), key=lambda place: len(workload.asks[place].tokens))

    def run(self, workload: Workload, setting: Any) -> Answers:
        order = self.order(workload)
        answers: dict[int, list[int]] = {}
        for begin in range(0, len(order), _ROWS):
            places = order[begin : begin + _ROWS]
            found = self._generate(workload, places)
            answers |= dict(zip(places, found, strict=True))
        return Answers.of([answers[place] for place in range(len(order))])

    def _generate(
        self, workload: Workload, places: Sequence[int], *, watch: Callable[..., Any] | None = None
    ) -> list[list[int]]:
        """A plain call: the useful tokens of each row, which are those that its request asked for.

        `watch`: called after each token as a stopping criterion.
        """
        import torch
        from transformers import GenerationConfig, StoppingCriteriaList

        asks = [workload.asks[place] for place in places]
        width = max(len(ask.tokens) for ask in asks)
        rows = [[self._pad] * (width - len(ask.tokens)) + list(ask.tokens) for ask in asks]
        mask = [[0] * (width - len(ask.tokens)) + [1] * len(ask.tokens) for ask in asks]
        most = max(ask.answer_tokens for ask in asks)
        found = self._model.generate(
            inputs=torch.tensor(rows, device=self.setup.device),
            attention_mask=torch.tensor(mask, device=self.setup.device),
            generation_config=GenerationConfig(do_sample=False, max_new_tokens=most, pad_token_id=self._pad),
            stopping_criteria=StoppingCriteriaList([] if watch is None else [watch]),
        )
        tokens = found[:, width:].tolist()
        return [row[: ask.answer_tokens] for row, ask in zip(tokens, asks, strict=True)]


class AnswerSortedGenerate(SortedGenerate):
    """Batches of answers of similar length, which whoever knows max_tokens of each request can make."""

    name: ClassVar[str] = "transformers generate, batches of 16 by answer length"

    def order(self, workload: Workload) -> list[int]:
        asks = workload.asks
        return sorted(range(len(asks)), key=lambda place: (asks[place].answer_tokens, len(asks[place].tokens)))


class OneByOneGenerate(SortedGenerate):
    name: ClassVar[str] = "transformers generate, one by one"
    most: ClassVar[int | None] = 16

    def run(self, workload: Workload, setting: Any) -> Answers:
        return Answers.of([self._generate(workload, [place])[0] for place in range(len(workload.asks))])


class Setting(NamedTuple):
    """The most rows and tokens of a step; its dense mask makes attention more expensive with each of them."""

    rows: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.rows} rows, {self.tokens} tokens"


class GenerateBatch(_Transformers):
    """The continuous batching behind `generate_batch`, through its manager: so that each request has its own limit."""

    name: ClassVar[str] = "transformers generate_batch"
    _manager: Any = None

    def settings(self, workload: Workload) -> Sequence[Any]:
        return [Setting(16, 256), Setting(32, 512), Setting(64, 512)]

    def ready(self, workload: Workload, setting: Any) -> None:
        """A manager of the workload's size, at work: stopping one takes more than a second, which is not measured."""
        from transformers import GenerationConfig

        self.close()
        self._manager = self._model.init_continuous_batching(
            generation_config=GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=self._pad),
            continuous_batching_config=self.config(workload, setting),
        )
        self._manager.warmup()
        self._manager.start()

    def config(self, workload: Workload, setting: Any) -> Any:
        from transformers.generation import ContinuousBatchingConfig

        return ContinuousBatchingConfig(
            page_size=_PAGE_TOKENS,
            num_blocks=setting.rows * (workload.longest_tokens // _PAGE_TOKENS + 2),
            max_batch_tokens=setting.tokens,
            max_requests_per_batch=setting.rows,
        )

    def close(self) -> None:
        if self._manager is not None:
            self._manager.stop(block=True)
            self._manager.destroy()
            self._manager = None

    def run(self, workload: Workload, setting: Any) -> Answers:
        return Answers.of([list(each.generated_tokens) for each in self.results(workload)])

    def results(self, workload: Workload, **asked: Any) -> list[Any]:
        """Returns the manager's result of each request. `asked`: further arguments, besides the lengths."""
        manager = self._manager
        found: dict[str, Any] = {}
        ids = {}
        for place in longest_first(workload.asks):
            ask = workload.asks[place]
            lengths = {"max_new_tokens": ask.answer_tokens, "eos_token_id": -1}
            ids[manager.add_request(list(ask.tokens), **lengths, **asked)] = place
        while len(found) < len(ids):
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                found[result.request_id] = result
            elif result is None and not manager.is_running():
                raise RuntimeError("the thread of generate_batch ended")
        by_place = {place: found[name] for name, place in ids.items()}
        return [by_place[place] for place in range(len(ids))]


class UntunedGenerateBatch(GenerateBatch):
    """Its rows, step and pages are what it chooses by itself."""

    name: ClassVar[str] = "transformers generate_batch, as it comes"

    def settings(self, workload: Workload) -> Sequence[Any]:
        return [""]

    def config(self, workload: Workload, setting: Any) -> Any:
        return None
