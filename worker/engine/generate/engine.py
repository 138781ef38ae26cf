"""The engine around transformers' own `generate`: one micro-batch after the other, each run to its end.

Owns the queue of one device, and the retries when its memory runs out. `batching` plans micro-batches, `tokenization`
holds text and tokens, `sampling` chooses the next token, and `stopping` ends rows; the cache and the positions are
`generate`'s own. Requests need nothing in common to run together.
"""

from __future__ import annotations

import gc
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from batchmill.jobs.requests.generation import GENERATION, GenerationRequest
from batchmill.jobs.requests.request import ErrorCode, Output, RequestKey
from batchmill.worker.devices.selection import is_out_of_memory
from batchmill.worker.engine import Progress, not_a_number
from batchmill.worker.engine.capacity import Capacity
from batchmill.worker.engine.generate.batching import RequestTokens, plan
from batchmill.worker.engine.generate.row_sampler import RowSampler
from batchmill.worker.engine.generate.sizing import size
from batchmill.worker.engine.lora import Lora
from batchmill.worker.engine.options import EngineOptions
from batchmill.worker.engine.refused import Refused
from batchmill.worker.engine.sizing import Load, MemoryBudget
from batchmill.worker.engine.stretching import Stretching
from batchmill.worker.engine.text.stopping import RowStopping
from batchmill.worker.engine.text.tokenization import Prompt, Tokenization
from batchmill.worker.models.load import LoadedModel

_DEFAULTS = EngineOptions()


class GenerateEngine:
    """Micro-batches of at most `rows` requests of similar length, each through one call of `generate`.

    A step runs one micro-batch to its end; progress is called before it and after each of its token steps. When the
    device runs out of memory, the step tries again with half of the cache places (`capacity`, which begins at
    `known_capacity` where an earlier process found that); a request that fails alone is answered by the error
    `out_of_memory`. An output's completion_tokens count the end token, as OpenAI and vLLM do. A micro-batch has one
    adapter, or none, and rows whose positions a model scales as it would for each alone.
    """

    kinds = frozenset({GENERATION.name})

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        options: EngineOptions = _DEFAULTS,
        progress: Progress = lambda: False,
        known_capacity: int | None = None,
    ) -> None:
        load = Load.of(loaded, token_bytes=loaded.cache_token_bytes)
        planned = size(load, MemoryBudget.of(loaded.device), options)
        #: Cache places of a micro-batch.
        self.capacity = Capacity(planned.places, found=known_capacity)
        self.limits = replace(planned.limits, cache_tokens=self.capacity.limit)
        self.cache_bytes = self.capacity.limit * load.token_bytes
        self.defaults = loaded.defaults
        self._loaded = loaded
        self._stretching = Stretching(loaded.model.config.get_text_config(), context_tokens=loaded.context_tokens)
        self._lora = Lora(loaded.model, loaded.adapters, device=loaded.device)
        self._progress = progress
        self._tokenization = Tokenization.of(loaded, context_tokens=loaded.context_tokens)
        self._waiting: dict[RequestKey, Prompt] = {}
        self._refused: dict[RequestKey, Output] = {}

    @staticmethod
    def admission_order(requests: Sequence[GenerationRequest]) -> Sequence[GenerationRequest]:
        """Keeps the order in which they came: each computes its whole prompt."""
        return requests

    @property
    def waiting(self) -> int:
        """Requests that were added and not answered; those that were refused are answered by the next step."""
        return len(self._waiting) + len(self._refused)

    @property
    def active(self) -> int:
        """Always 0: a step runs to its end."""
        return 0

    def add(self, key: RequestKey, request: GenerationRequest) -> None:
        """Takes a request whose `sampling` has max_tokens and temperature set."""
        try:
            _refuse_unsupported(request)
            self._lora.number(request.adapter)
            self._waiting[key] = self._tokenization.prompt(request)
        except Refused as refused:
            self._refused[key] = Output.failed(key, refused.code, str(refused), prompt_tokens=refused.prompt_tokens)

    def cancel(self, keys: Collection[RequestKey]) -> None:
        """Forgets these requests; unknown keys are ignored."""
        for key in keys:
            self._waiting.pop(key, None)
            self._refused.pop(key, None)

    def tokens_so_far(self) -> Mapping[RequestKey, int]:
        """Nothing: a step runs to its end."""
        return {}

    def step(self) -> list[Output]:
        """Runs one micro-batch. Returns its outputs and those of requests refused meanwhile; none if nothing waits.

        Raises what the model's forward raises, but for a lack of memory.
        """
        outputs = list(self._refused.values())
        self._refused.clear()
        while self._waiting and not self._progress():
            keys = self._alike()
            sizes = [RequestTokens(len(self._waiting[key].tokens), self._waiting[key].max_tokens) for key in keys]
            planned = plan(sizes, rows=self.limits.rows, tokens=self.capacity.limit)
            batch = {keys[place]: self._waiting[keys[place]] for place in planned.places}
            answered = self._answer(batch)
            if answered is not None:
                self.capacity.held(planned.tokens)
                # A request that was cancelled meanwhile gives no output.
                return outputs + [each for each in answered if self._waiting.pop(each.key, None)]
            self._free_memory()
            if len(batch) == 1:
                return outputs + [self._too_large(key) for key in batch]
            self.capacity.too_much(planned.tokens)
        return outputs

    def close(self) -> None:
        """Does nothing: nothing runs beside a step."""

    def _alike(self) -> list[RequestKey]:
        """The waiting requests that may run with the oldest one, oldest first."""
        first, oldest = next(iter(self._waiting.items()))
        company = self._company(oldest)
        if company is None:
            return [first]
        alike = [key for key, prompt in self._waiting.items() if prompt.adapter == oldest.adapter]
        return [key for key in alike if self._company(self._waiting[key]) == company]

    def _company(self, prompt: Prompt) -> int | None:
        return self._stretching.company(len(prompt.tokens), prompt.max_tokens)

    def _answer(self, batch: Mapping[RequestKey, Prompt]) -> list[Output] | None:
        """Runs a micro-batch. Returns the outputs of the rows that ended; None if the memory does not suffice."""
        try:
            answers = self._generate(list(batch.values()))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            # Nothing is freed here: the exception's frames hold the tensors until this block is left.
            return None
        outputs = []
        for (key, prompt), (tokens, failed) in zip(batch.items(), answers, strict=True):
            if failed:
                outputs.append(_not_a_number(key, prompt, len(tokens) - 1))
            elif tokens:
                choice = self._tokenization.choice(prompt, tokens, named=f"{key.job_id}/{key.index}/0")
                outputs.append(Output(key, (choice,), len(prompt.tokens), len(tokens)))
        return outputs

    def _generate(self, prompts: Sequence[Prompt]) -> list[tuple[list[int], bool]]:
        """Generates the tokens that answer each prompt, the end token included; none for a row that has not ended.

        A flag beside them is True where the row ended because the logits of its last token were no numbers.
        """
        device = self._loaded.device
        width = max(len(each.tokens) for each in prompts)
        padding = [width - len(each.tokens) for each in prompts]
        pad = self._loaded.pad_token_id
        rows = [[pad] * places + list(each.tokens) for places, each in zip(padding, prompts, strict=True)]
        mask = [[0] * places + [1] * (width - places) for places in padding]
        max_tokens = max(each.max_tokens for each in prompts)
        sampler = RowSampler(prompts, vocabulary=self._loaded.vocabulary, device=device)
        stopping = RowStopping(
            prompts,
            self._tokenization,
            end_token_ids=self._loaded.end_token_ids,
            width=width,
            sound=sampler.sound,
            progress=self._progress,
        )
        assignment = self._lora.assign_all(self._lora.number(prompts[0].adapter))
        limit = self._stretching.most_tokens(self._company(prompts[0]))
        with self._positions_within(limit, width + max_tokens), self._lora.applied(assignment):
            sequences = self._loaded.model.generate(
                inputs=torch.tensor(rows, device=device),
                attention_mask=torch.tensor(mask, device=device),
                # Sampling and ends are the sampler's and the criterion's: `generate` takes the largest score.
                generation_config=GenerationConfig(do_sample=False, max_new_tokens=max_tokens, pad_token_id=pad),
                logits_processor=LogitsProcessorList([sampler]),
                stopping_criteria=StoppingCriteriaList([stopping]),
            )
        ends = zip(sequences[:, width:].tolist(), stopping.counts.tolist(), stopping.failed.tolist(), strict=True)
        return [(row[:count], failed) for row, count, failed in ends]

    @contextmanager
    def _positions_within(self, limit: int | None, length: int) -> Iterator[None]:
        """Keeps rows that have ended, and are stepped on beside longer ones, at the last position within a limit.

        Without it they would reach positions for which a model has no embedding, or which make it rescale all rows.
        """
        if limit is None or length <= limit:
            yield
            return

        def clamp(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            if kwargs.get("position_ids") is not None:
                kwargs["position_ids"] = kwargs["position_ids"].clamp(max=limit - 1)
            return args, kwargs

        hook = self._loaded.model.register_forward_pre_hook(clamp, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    def _free_memory(self) -> None:
        gc.collect()
        if self._loaded.device.type == "cuda":
            torch.cuda.empty_cache()

    def _too_large(self, key: RequestKey) -> Output:
        prompt = self._waiting.pop(key)
        return Output.failed(
            key,
            ErrorCode.OUT_OF_MEMORY,
            f"the device has not enough memory for this request alone, of {len(prompt.tokens)} prompt tokens and up "
            f"to {prompt.max_tokens} more: shorten the prompt or lower max_tokens",
            prompt_tokens=len(prompt.tokens),
        )


def _not_a_number(key: RequestKey, prompt: Prompt, answered: int) -> Output:
    return Output.failed(key, ErrorCode.NOT_A_NUMBER, not_a_number(answered), prompt_tokens=len(prompt.tokens))


def _refuse_unsupported(request: GenerationRequest) -> None:
    """Raises Refused for an option that one call of `generate` cannot give to one row alone."""
    sampling = request.sampling
    wanted = {
        "n": (sampling.n or 1) > 1,
        "logprobs": sampling.logprobs,
        "response_format": sampling.response_format is not None,
    }
    if unsupported := [name for name, each in wanted.items() if each]:
        raise Refused(
            ErrorCode.UNSUPPORTED_BY_WORKER,
            f"the model's worker runs the generate engine, which has no {', '.join(unsupported)}: remove it, or serve "
            "the request by a model that the continuous engine supports",
        )
