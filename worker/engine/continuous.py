"""batchmill's own engine: requests enter and leave the running batch at every token step.

Owns the loop: schedule, run, postprocess. What the next step computes is decided in `schedule`, the model is behind
`decoder`, the next tokens are `sampler`'s, and an answer's text is made by a thread beside the device.
"""

from __future__ import annotations

import gc
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from time import monotonic, perf_counter
from typing import NamedTuple

import torch

from jobs.schema import Output, Request, RequestKey
from worker.devices import is_out_of_memory
from worker.engine import Progress
from worker.engine.answer import Answer, ChoiceRow, TokenLogprob
from worker.engine.capacity import Capacity
from worker.engine.decoder import Decoder, Unsupported, cache_shape, refuse_outliers
from worker.engine.flash import PAGE_TOKENS, serves
from worker.engine.grammar import Grammars, fill
from worker.engine.limits import copy_bytes, limits
from worker.engine.logprobs import Logprobs
from worker.engine.options import EngineOptions
from worker.engine.sampler import Sampler
from worker.engine.schedule import Schedule, Step
from worker.engine.slots import SMALLEST_TOKENS, Slots
from worker.engine.tokenization import Refused, Tokenization
from worker.engine.weights import prepare
from worker.loader import LoadedModel

__all__ = ["ContinuousEngine", "Unsupported"]


class ContinuousEngine:
    """Iteration-level batching of any decoder model, over a cache of its own.

    `fits`: the tokens of a step that an earlier process of this device found to fit. Tests and benchmarks set
    `share_prefixes` and `step_tokens`. Raises Unsupported, which says why it cannot serve a model.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        options: EngineOptions,
        progress: Progress = lambda: False,
        fits: int | None = None,
        share_prefixes: bool = True,
        step_tokens: int | None = None,
    ) -> None:
        if options.deterministic:
            refuse_outliers(loaded.model)
        shape = cache_shape(loaded)
        #: What was done to the model's weights, for those who measure.
        self.prepared = prepare(loaded.model, dequantize=options.dequantize, free_bytes=copy_bytes(loaded, options))
        most = limits(loaded, shape, options)
        flash = serves(shape, loaded.device)
        slots = Slots(
            most.cache_tokens, longest=most.context_tokens, smallest=PAGE_TOKENS if flash else SMALLEST_TOKENS
        )
        self.rows, self.context_tokens, self.cache_tokens = most.rows, most.context_tokens, slots.tokens
        step_tokens = max(step_tokens or most.step_tokens, most.rows)
        self.capacity = Capacity(step_tokens, found=fits)
        self.defaults = loaded.defaults
        self._decoder = Decoder(loaded, shape, slots, rows=most.rows, tokens=step_tokens, fixed=options.deterministic)
        self._schedule = Schedule[ChoiceRow](slots, seats=most.rows, close_holes=not flash, alone=options.deterministic)
        self._sampler = Sampler(seats=self.rows, vocabulary=loaded.vocabulary, device=loaded.device)
        self._tokenization = Tokenization(
            loaded.tokenizer,
            vocabulary=loaded.vocabulary,
            context_tokens=self.context_tokens,
            end_token_ids=loaded.end_token_ids,
        )
        self._grammars = Grammars(loaded.tokenizer, vocabulary=loaded.vocabulary, end_token_ids=loaded.end_token_ids)
        self._loaded = loaded
        self._progress = progress
        self._share = share_prefixes and not options.deterministic
        self._answers: dict[RequestKey, Answer] = {}
        self._done: list[Output] = []
        self._texts = ThreadPoolExecutor(1, thread_name_prefix="detokenize")
        self._written: dict[RequestKey, Future[Output]] = {}
        self._seconds: defaultdict[str, float] = defaultdict(float)

    @property
    def waiting(self) -> int:
        """Requests that were added and not begun; those that were refused are answered by the next step."""
        return self._schedule.waiting + len(self._done)

    @property
    def active(self) -> int:
        """Requests begun and unfinished, those whose text is being written included."""
        return self._schedule.running + len(self._written)

    def add(self, key: RequestKey, request: Request) -> None:
        """Takes a request whose `sampling` has max_tokens and temperature set."""
        try:
            prompt = self._tokenization.prompt(request)
            wanted = prompt.sampling.response_format
            matchers = [self._grammars.matcher(wanted) for _ in range(prompt.sampling.n or 1)] if wanted else []
        except Refused as refused:
            self._done.append(Output.failed(key, refused.code, str(refused), prompt_tokens=refused.prompt_tokens))
            return
        answer = self._answers[key] = Answer(key, prompt, self._tokenization, matchers=matchers, share=self._share)
        for row in answer.rows:
            self._schedule.add(row)

    def cancel(self, keys: Collection[RequestKey]) -> None:
        """Forgets these requests; unknown keys are ignored."""
        for key in keys:
            answer = self._answers.pop(key, None)
            for row in answer.rows if answer is not None else ():
                self._leave(row)
            self._written.pop(key, None)
        gone = set(keys)
        self._done = [output for output in self._done if output.key not in gone]

    @torch.inference_mode()
    def step(self) -> list[Output]:
        """One forward: a token of every row that decodes, and some of prompts. The outputs that are ready."""
        if not self._progress():
            with self._timed("schedule"):
                step = self._schedule.plan(self.capacity.limit)
            if step.pieces:
                self._run(step)
        return self._ready()

    def split(self) -> dict[str, float]:
        """Seconds by part since the engine was made: where the time of its steps went."""
        attention = self._decoder.attention_seconds
        return {**self._seconds, "model": self._seconds["model"] - attention, "attention": attention}

    def close(self) -> None:
        """Ends the thread that writes texts."""
        self._texts.shutdown()

    def _run(self, step: Step[ChoiceRow]) -> None:
        with self._timed("bookkeeping"):
            self._take_seats(step)
        rows = [piece.row for piece in step.pieces if piece.sampled]
        try:
            with self._timed("model"):
                self._decoder.copy(step.copies)
                logits = self._decoder.logits(step.pieces)
            with self._timed("sampling"):
                sampled = self._sample(rows, logits)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            sampled = None
        # Memory is freed out here: the exception's frames hold tensors until their block is left.
        if sampled is None:
            self._too_much(step)
            return
        with self._timed("bookkeeping"):
            self.capacity.held(step.tokens)
            self._schedule.computed(step)
            self._take(rows, sampled)

    def _take_seats(self, step: Step[ChoiceRow]) -> None:
        for seat in step.vacated:
            self._sampler.leave(seat)
        for row in step.entered:
            row.answer.began()
            sampling = row.prompt.sampling
            self._sampler.enter(
                row.seat,
                # Where a grammar says what may end, min_tokens does not: nothing else might be allowed.
                sampling if row.matcher is None else replace(sampling, min_tokens=None),
                prompt=row.prompt.tokens,
                generated=row.generated,
                end_token_ids=row.prompt.end_token_ids,
                choice=row.choice,
            )

    def _sample(self, rows: Sequence[ChoiceRow], logits: torch.Tensor) -> _Tokens:
        if not rows:
            return _Tokens([], {})
        sampled = self._sampler.sample([row.seat for row in rows], logits, allowed=self._allowed(rows))
        tokens = sampled.tokens.tolist()
        return _Tokens(tokens, _logprobs(sampled.logprobs, rows, tokens))

    def _allowed(self, rows: Sequence[ChoiceRow]) -> torch.Tensor | None:
        """What the grammars of these rows allow, packed; None if no row has one."""
        matchers = [(place, row.matcher) for place, row in enumerate(rows) if row.matcher is not None]
        if not matchers:
            return None
        allowed = torch.full((len(rows), -(-self._loaded.vocabulary // 32)), -1, dtype=torch.int32)
        fill(matchers, allowed)
        return allowed.to(self._loaded.device, non_blocking=True)

    def _take(self, rows: Sequence[ChoiceRow], sampled: _Tokens) -> None:
        for place, (row, token) in enumerate(zip(rows, sampled.tokens, strict=True)):
            row.answer.token_came()
            if place in sampled.logprobs:
                row.logprobs.append(sampled.logprobs[place])
            if row.take(token):
                self._leave(row)
                if row.answer.row_ended():
                    self._write(row.answer)

    def _leave(self, row: ChoiceRow) -> None:
        if row.seat >= 0:
            self._sampler.leave(row.seat)
        self._schedule.leave(row)

    def _write(self, answer: Answer) -> None:
        del self._answers[answer.key]
        self._written[answer.key] = self._texts.submit(answer.output, monotonic())

    def _ready(self) -> list[Output]:
        """Outputs whose text is written; those of the last rows are waited for."""
        outputs, self._done = self._done, []
        idle = not self._schedule.running and not self._schedule.waiting
        with self._timed("detokenize"):
            for key, future in list(self._written.items()):
                if idle or future.done():
                    outputs.append(future.result())
                    del self._written[key]
        return outputs

    def _too_much(self, step: Step[ChoiceRow]) -> None:
        """The device could not hold this step: it is planned anew, smaller; what fails alone is answered so."""
        gc.collect()
        if self._loaded.device.type == "cuda":
            torch.cuda.empty_cache()
        if step.tokens > 1:
            self.capacity.too_much(step.tokens)
            return
        answer = step.pieces[0].row.answer
        self.cancel([answer.key])
        self._done.append(answer.too_large())

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        begin = perf_counter()
        try:
            yield
        finally:
            self._seconds[part] += perf_counter() - begin


class _Tokens(NamedTuple):
    """The next token of each row, and the logprobs of those places that ask for them."""

    tokens: list[int]
    logprobs: dict[int, TokenLogprob]


def _logprobs(found: Logprobs | None, rows: Sequence[ChoiceRow], tokens: Sequence[int]) -> dict[int, TokenLogprob]:
    if found is None:
        return {}
    said = {}
    chosen, top_ids, top = found.chosen.tolist(), found.top_ids.tolist(), found.top.tolist()
    for number, place in enumerate(found.places):
        wanted = rows[place].prompt.sampling.top_logprobs or 0
        alternatives = tuple(zip(top_ids[number][:wanted], top[number][:wanted], strict=True))
        said[place] = TokenLogprob(tokens[place], chosen[number], alternatives)
    return said
