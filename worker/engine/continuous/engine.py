"""batchmill's own engine: requests enter and leave the running batch at every token step.

Owns the loop: take in, schedule, execute, postprocess. `intake` makes Answers of requests, `schedule` decides what the
next step computes, `decoder` holds the model, `sampling` chooses the next tokens, and a thread beside the device writes
the text of answers.
"""

from __future__ import annotations

import gc
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from time import monotonic, perf_counter

import torch

from batchmill.jobs.requests.generation import GENERATION, GenerationRequest
from batchmill.jobs.requests.request import Output, RequestKey
from batchmill.worker.devices.selection import is_out_of_memory
from batchmill.worker.engine import Progress
from batchmill.worker.engine.capacity import Capacity
from batchmill.worker.engine.continuous.answer import Answer, ChoiceRow
from batchmill.worker.engine.continuous.decoders import open_decoder
from batchmill.worker.engine.continuous.execution.executor import Executor, InFlightStep
from batchmill.worker.engine.continuous.intake import Intake
from batchmill.worker.engine.continuous.scheduling.prefixes import by_beginning
from batchmill.worker.engine.continuous.scheduling.schedule import Schedule
from batchmill.worker.engine.continuous.scheduling.step import Step
from batchmill.worker.engine.continuous.sizing import copies_budget_bytes
from batchmill.worker.engine.continuous.support import cache_shape, refuse_outliers
from batchmill.worker.engine.continuous.weights.preparation import Prepared, prepare
from batchmill.worker.engine.grammar.grammars import Grammars
from batchmill.worker.engine.lora import Lora
from batchmill.worker.engine.options import EngineOptions
from batchmill.worker.engine.sampling.sampler import Sampler
from batchmill.worker.engine.sizing import Load, MemoryBudget
from batchmill.worker.engine.text.token_logprobs import TokenLogprob
from batchmill.worker.engine.text.tokenization import Tokenization
from batchmill.worker.models.load import LoadedModel

#: The longest wait of a step for a grammar while nothing else is to do.
_COMPILING_SECONDS = 0.05


class ContinuousEngine:
    """Iteration-level batching of any decoder model, over a cache of its own.

    `known_capacity`: the tokens of a step that an earlier process of this device found to fit. Tests and benchmarks set
    `share_prefixes`, `step_tokens`, and `ahead`: a step is launched before the tokens of the last one are known, which
    pays only on a device that works beside the host. Raises Unsupported, which says why it cannot serve a model.
    """

    kinds = frozenset({GENERATION.name})

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        options: EngineOptions,
        progress: Progress = lambda: False,
        known_capacity: int | None = None,
        share_prefixes: bool = True,
        step_tokens: int | None = None,
        ahead: bool | None = None,
    ) -> None:
        if options.deterministic:
            refuse_outliers(loaded.model)
        shape = cache_shape(loaded)
        load = Load.of(loaded, token_bytes=shape.token_bytes)
        #: The changes to the layout of the model's weights, for the log.
        self.prepared = _prepared(loaded, load, options)
        fixed = options.deterministic
        lora = Lora(loaded.model, loaded.adapters, device=loaded.device, fixed=fixed)
        opened = open_decoder(loaded, shape, load, options, lora=lora, step_tokens=step_tokens)
        self.limits, rows = opened.limits, opened.limits.rows
        self.capacity = Capacity(opened.step_tokens, found=known_capacity)
        self.defaults = loaded.defaults
        self._decoder = opened.decoder
        self.cache_bytes = self._decoder.cache_bytes
        close_holes = not opened.backend.pages
        self._schedule = Schedule[ChoiceRow](opened.slots, batch_slots=rows, close_holes=close_holes, alone=fixed)
        sampler = Sampler(batch_slots=rows, vocabulary=loaded.vocabulary, device=loaded.device)
        self._executor = Executor(self._decoder, sampler, vocabulary=loaded.vocabulary, device=loaded.device)
        self._in_flight: InFlightStep | None = None
        self._ahead = loaded.device.type == "cuda" if ahead is None else ahead
        tokenization = Tokenization.of(loaded, context_tokens=self.limits.context_tokens)
        grammars = Grammars(loaded.tokenizer, vocabulary=loaded.vocabulary, end_token_ids=loaded.end_token_ids)
        self._intake = Intake(tokenization, grammars, lora, share=share_prefixes and not fixed)
        self._loaded = loaded
        self._progress = progress
        self._answers: dict[RequestKey, Answer] = {}
        self._failed: list[Output] = []
        self._texts = ThreadPoolExecutor(1, thread_name_prefix="detokenize")
        self._written: dict[RequestKey, Future[Output]] = {}
        self._seconds: defaultdict[str, float] = defaultdict(float)

    @staticmethod
    def admission_order(requests: Sequence[GenerationRequest]) -> Sequence[GenerationRequest]:
        """Puts requests with a common prefix beside each other, so that each prefix is computed once."""
        return by_beginning(requests)

    @property
    def waiting(self) -> int:
        """Requests that were added and not begun; those that were refused are answered by the next step."""
        return self._schedule.waiting + len(self._intake) + len(self._failed)

    @property
    def active(self) -> int:
        """Requests begun and unfinished, those whose text is being written included."""
        return self._schedule.running + len(self._written)

    def add(self, key: RequestKey, request: GenerationRequest) -> None:
        """Takes a request whose `sampling` has max_tokens and temperature set."""
        answer = self._intake.take(key, request)
        if answer is not None:
            self._enqueue(answer)

    def cancel(self, keys: Collection[RequestKey]) -> None:
        """Forgets these requests; unknown keys are ignored."""
        self._intake.cancel(keys)
        for key in keys:
            answer = self._answers.pop(key, None)
            for row in answer.rows if answer is not None else ():
                self._leave(row)
            self._written.pop(key, None)
        gone = set(keys)
        self._failed = [output for output in self._failed if output.key not in gone]

    def tokens_so_far(self) -> Mapping[RequestKey, int]:
        """The tokens of every answer that was begun, all of its choices together."""
        return {
            key: sum(len(row.tokens) - row.prompt_tokens for row in answer.rows)
            for key, answer in self._answers.items()
        }

    @torch.inference_mode()
    def step(self) -> list[Output]:
        """Computes a token of every row that decodes, and some of prompts. Returns the outputs that are ready."""
        self._take_in()
        if not self._progress():
            self._advance()
        return self._ready()

    def split(self) -> dict[str, float]:
        """Seconds that steps have spent since the engine was made, by part."""
        attention = self._decoder.attention_seconds
        launched = self._executor.seconds
        return {**self._seconds, **launched, "model": launched["model"] - attention, "attention": attention}

    def close(self) -> None:
        """Ends the threads that write texts and compile grammars."""
        self._texts.shutdown()
        self._intake.close()

    def _enqueue(self, answer: Answer) -> None:
        self._answers[answer.key] = answer
        for row in answer.rows:
            self._schedule.add(row)

    def _take_in(self) -> None:
        """Enqueues the requests whose grammars are compiled; waits for one a moment where nothing else is to do."""
        for answer in self._intake.compiled(seconds=0.0 if self._scheduled else _COMPILING_SECONDS):
            self._enqueue(answer)

    @property
    def _scheduled(self) -> int:
        return self._schedule.running + self._schedule.waiting

    def _advance(self) -> None:
        """Launches a step, and where it can the one after it, and takes the tokens of the first."""
        in_flight = self._in_flight or self._launch_planned()
        self._in_flight = None
        if in_flight is not None:
            if self._ahead:
                self._in_flight = self._launch_ahead(in_flight)
            self._finish(in_flight)

    def _launch_planned(self) -> InFlightStep | None:
        with self._timed("schedule"):
            step = self._schedule.schedule(self.capacity.limit)
        if not step.pieces:
            return None
        for row in step.entered:
            row.answer.began()
        self._enter(step)
        if not step.pieces:
            self._decoder.copy(step.copies)
            return None
        try:
            return self._executor.launch(step)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # Memory is freed out here: the exception's frames hold tensors until their block is left.
        self._too_much(step)
        return None

    def _enter(self, step: Step[ChoiceRow]) -> None:
        """Gives entering rows their places in the sampler; the step goes on without those that find no memory there."""
        for row in self._executor.enter(step):
            if not row.ended:
                self._fail(row.answer, row.answer.too_large())
                step.pieces = [piece for piece in step.pieces if not piece.row.ended]

    def _launch_ahead(self, in_flight: InFlightStep) -> InFlightStep | None:
        if any(row.matcher is not None for row in in_flight.rows):
            return None
        with self._timed("schedule"):
            step = self._schedule.schedule_ahead(in_flight.step)
        if step is None:
            return None
        try:
            return self._executor.launch_ahead(in_flight, step)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return None

    def _finish(self, in_flight: InFlightStep) -> None:
        with self._timed("waiting"):
            rows_done = list(in_flight.wait())
        with self._timed("bookkeeping"):
            self.capacity.held(in_flight.step.tokens)
            self._schedule.computed(in_flight.step)
            for row, token, logprob in rows_done:
                if row.ended:
                    continue
                if token is None:
                    self._fail(row.answer, row.answer.not_a_number(row))
                else:
                    self._take(row, token, logprob)

    def _take(self, row: ChoiceRow, token: int, logprob: TokenLogprob | None) -> None:
        row.answer.token_came()
        if logprob is not None:
            row.logprobs.append(logprob)
        if row.take(token):
            self._leave(row)
            if row.answer.row_ended():
                self._write(row.answer)

    def _leave(self, row: ChoiceRow) -> None:
        if row.ended:
            return
        row.ended = True
        if row.batch_slot >= 0:
            self._executor.leave(row)
        self._schedule.leave(row)

    def _write(self, answer: Answer) -> None:
        del self._answers[answer.key]
        self._written[answer.key] = self._texts.submit(answer.output, monotonic())

    def _ready(self) -> list[Output]:
        """Outputs whose text is written; those of the last rows are waited for."""
        outputs, self._failed = self._intake.refusals() + self._failed, []
        idle = not self._scheduled
        with self._timed("detokenize"):
            for key, future in list(self._written.items()):
                if idle or future.done():
                    outputs.append(future.result())
                    del self._written[key]
        return outputs

    def _too_much(self, step: Step[ChoiceRow]) -> None:
        """Plans smaller after a step that the device could not hold; a row that fails alone is answered by an error."""
        gc.collect()
        if self._loaded.device.type == "cuda":
            torch.cuda.empty_cache()
        if step.tokens > 1:
            self.capacity.too_much(step.tokens)
            return
        answer = step.pieces[0].row.answer
        self._fail(answer, answer.too_large())

    def _fail(self, answer: Answer, output: Output) -> None:
        """Forgets a request, and answers it with this error."""
        self.cancel([answer.key])
        self._failed.append(output)

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        begin = perf_counter()
        try:
            yield
        finally:
            self._seconds[part] += perf_counter() - begin


def _prepared(loaded: LoadedModel, load: Load, options: EngineOptions) -> Prepared:
    """Lays out the model's weights for speed; offloaded ones stay as they are."""
    if loaded.layout.offloaded:
        return Prepared()
    spare = copies_budget_bytes(load, MemoryBudget.of(loaded.device), options)
    return prepare(loaded.model, dequantize=options.dequantize, free_bytes=spare)
