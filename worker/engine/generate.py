"""The engine around transformers' own `generate`: one micro-batch after the other, each run to its end.

Owns the queue of one device, and what happens when its memory does not suffice. What runs together is decided in
`planning`, text and tokens in `tokenization`, the next token in `sampler`, the end of a row in `stopping`; the cache
and the positions are `generate`'s own. Requests need nothing in common to run together.
"""

from __future__ import annotations

import gc
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from jobs.schema import ErrorCode, Output, Request, RequestKey
from worker.devices import is_out_of_memory
from worker.engine import Progress
from worker.engine.planning import Size, plan
from worker.engine.sampler import RowSampler
from worker.engine.stopping import RowStopping
from worker.engine.tokenization import Prompt, Refused, Tokenization
from worker.loader import LoadedModel
from worker.telemetry import MemoryReader

#: How many requests run together where nothing else is asked.
GENERATE_ROWS = 32
#: The cache of a micro-batch is planned to take one part of the free memory in this many: a layer's cache is copied
#: whenever it grows, and reading the prompts takes memory of the same order.
MEMORY_PARTS = 3


class GenerateEngine:
    """Micro-batches of at most `rows` requests of similar length, each through one call of `generate`.

    A step runs one micro-batch to its end; progress is called before it and after each of its token steps. When the
    device runs out of memory, the step tries again with half of the cache places and never plans above that again
    (`tokens_that_fit`); a request that fails alone is answered by the error `out_of_memory`.
    """

    def __init__(
        self, loaded: LoadedModel, *, rows: int = GENERATE_ROWS, progress: Progress = lambda: False
    ) -> None:
        self.rows = rows
        self.defaults = loaded.defaults
        #: Cache places of a micro-batch, at most.
        available = MemoryReader(str(loaded.device)).available_bytes()
        self.tokens_that_fit = available // (MEMORY_PARTS * loaded.cache_token_bytes)
        self._loaded = loaded
        self._progress = progress
        self._tokenization = Tokenization(
            loaded.tokenizer,
            vocabulary=loaded.vocabulary,
            context_tokens=loaded.context_tokens,
            end_token_ids=loaded.end_token_ids,
        )
        self._generator = torch.Generator()
        self._generator.seed()
        self._waiting: dict[RequestKey, Prompt] = {}
        self._refused: dict[RequestKey, Output] = {}

    @property
    def waiting(self) -> int:
        """Requests that were added and not answered; those that were refused are answered by the next step."""
        return len(self._waiting) + len(self._refused)

    @property
    def active(self) -> int:
        """Always 0: a step runs to its end."""
        return 0

    def add(self, key: RequestKey, request: Request) -> None:
        """Takes a request whose `sampling` has max_tokens and temperature set."""
        try:
            self._waiting[key] = self._tokenization.prompt(request)
        except Refused as refused:
            self._refused[key] = Output.failed(
                key, refused.code, str(refused), prompt_tokens=refused.prompt_tokens
            )

    def cancel(self, keys: Collection[RequestKey]) -> None:
        """Forgets these requests; unknown keys are ignored."""
        for key in keys:
            self._waiting.pop(key, None)
            self._refused.pop(key, None)

    def step(self) -> list[Output]:
        """The outputs of one micro-batch and of requests refused meanwhile; none if nothing waits.

        Raises what the model's forward raises, but for a lack of memory.
        """
        outputs = list(self._refused.values())
        self._refused.clear()
        while self._waiting and not self._progress():
            planned = plan(self._sizes(), rows=self.rows, tokens=self.tokens_that_fit)
            keys = list(self._waiting)
            batch = {keys[place]: self._waiting[keys[place]] for place in planned.places}
            answered = self._answer(batch)
            if answered is not None:
                # A request that was cancelled meanwhile gives no output.
                return outputs + [each for each in answered if self._waiting.pop(each.key, None)]
            self._free_memory()
            if len(batch) == 1:
                return outputs + [self._failed(key) for key in batch]
            self.tokens_that_fit = planned.tokens // 2
        return outputs
