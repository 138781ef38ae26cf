"""Executes steps on the device: each is launched, and is in flight until its tokens have come back to the host.

Owns the way from a plan to the next tokens: forward, grammar masks, sampling, and the copy back. A step of rows that
decode can be launched while the one before it is in flight, since its input never has to leave the device.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from time import perf_counter

import numpy as np
import torch

from batchmill.worker.devices.selection import is_out_of_memory
from batchmill.worker.devices.upload import upload
from batchmill.worker.engine.continuous.answer import ChoiceRow
from batchmill.worker.engine.continuous.execution.decoder import Decoder
from batchmill.worker.engine.continuous.scheduling.step import Step
from batchmill.worker.engine.grammar.grammars import fill
from batchmill.worker.engine.sampling.logprobs import Logprobs
from batchmill.worker.engine.sampling.sampler import Sampler
from batchmill.worker.engine.text.token_logprobs import TokenLogprob

_WORD_BITS = 32
#: The token of a row whose logits are no numbers.
_NO_TOKEN = -1


@dataclass(frozen=True, slots=True)
class InFlightStep:
    """A launched step."""

    step: Step[ChoiceRow]
    #: Rows that get a token.
    rows: Sequence[ChoiceRow]
    #: Their tokens, (rows,), on the device.
    tokens: torch.Tensor
    #: The same for the host, with _NO_TOKEN for a row whose logits are no numbers.
    _copy: torch.Tensor
    _logprobs: Logprobs | None
    _done: torch.cuda.Event | None

    def wait(self) -> Iterator[tuple[ChoiceRow, int | None, TokenLogprob | None]]:
        """Waits for the step. Yields each row with its next token, and the token's logprob where it is asked for.

        A row whose logits are no numbers has no token.
        """
        if self._done is not None:
            self._done.synchronize()
        tokens = self._copy.tolist()
        logprobs = _token_logprobs(self._logprobs, self.rows, tokens)
        for place, (row, token) in enumerate(zip(self.rows, tokens, strict=True)):
            yield row, None if token == _NO_TOKEN else token, logprobs.get(place)


class Executor:
    """Launches the steps of one engine. `seconds`: the time spent in the model and in sampling so far."""

    def __init__(self, decoder: Decoder, sampler: Sampler, *, vocabulary: int, device: torch.device) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._decoder = decoder
        self._sampler = sampler
        self._words = -(-vocabulary // _WORD_BITS)
        self._device = device

    def enter(self, step: Step[ChoiceRow]) -> list[ChoiceRow]:
        """Tells the sampler which rows take which batch slots. Returns the rows for which it has no memory."""
        for batch_slot in step.vacated:
            self._sampler.leave(batch_slot)
        return [row for row in step.entered if not self._entered(row)]

    def _entered(self, row: ChoiceRow) -> bool:
        sampling = row.prompt.sampling
        try:
            self._sampler.enter(
                row.batch_slot,
                # A grammar takes precedence over min_tokens: it may allow nothing but the end.
                sampling if row.matcher is None else replace(sampling, min_tokens=None),
                prompt=row.prompt.tokens,
                generated=row.generated,
                end_token_ids=row.prompt.end_token_ids,
                choice=row.choice,
            )
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return False
        return True

    def leave(self, row: ChoiceRow) -> None:
        """Tells the sampler that this row leaves its batch slot."""
        self._sampler.leave(row.batch_slot)

    def launch(self, step: Step[ChoiceRow]) -> InFlightStep:
        """Launches a planned step."""
        with self._timed("model"):
            self._decoder.copy(step.copies)
            logits = self._decoder.logits(step.pieces)
        return self._sampled(step, [piece.row for piece in step.pieces if piece.sampled], logits)

    def launch_ahead(self, in_flight: InFlightStep, step: Step[ChoiceRow]) -> InFlightStep:
        """Launches the step after the one in flight; its rows are those of that one, or some of them."""
        rows = [piece.row for piece in step.pieces]
        newest = in_flight.tokens
        if len(rows) < len(in_flight.rows):
            staying = set(map(id, rows))
            places = [place for place, row in enumerate(in_flight.rows) if id(row) in staying]
            newest = newest.index_select(0, upload(np.array(places), self._device))
        with self._timed("model"):
            logits = self._decoder.following(step.pieces, newest)
        return self._sampled(step, rows, logits)

    def _sampled(self, step: Step[ChoiceRow], rows: Sequence[ChoiceRow], logits: torch.Tensor) -> InFlightStep:
        with self._timed("sampling"):
            if not rows:
                nothing = torch.empty(0, dtype=torch.long)
                return InFlightStep(step, rows, nothing, nothing, None, None)
            sampled = self._sampler.sample([row.batch_slot for row in rows], logits, allowed=self._allowed(rows))
            logprobs = sampled.logprobs
            host_tokens = sampled.tokens.masked_fill(~sampled.sound, _NO_TOKEN)
            if self._device.type == "cpu":
                return InFlightStep(step, rows, sampled.tokens, host_tokens, logprobs, None)
            if logprobs is not None:
                logprobs = Logprobs(
                    logprobs.places, _to_host(logprobs.chosen), _to_host(logprobs.top_ids), _to_host(logprobs.top)
                )
            copy = _to_host(host_tokens)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record()
            return InFlightStep(step, rows, sampled.tokens, copy, logprobs, done)

    def _allowed(self, rows: Sequence[ChoiceRow]) -> torch.Tensor | None:
        """Fills the packed bitmask of these rows' grammars while the device computes; None if no row has one."""
        matchers = [(place, row.matcher) for place, row in enumerate(rows) if row.matcher is not None]
        if not matchers:
            return None
        allowed = torch.full((len(rows), self._words), -1, dtype=torch.int32)
        fill(matchers, allowed)
        return allowed.to(self._device, non_blocking=True)

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        begin = perf_counter()
        try:
            yield
        finally:
            self.seconds[part] += perf_counter() - begin


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Starts a copy that nothing waits for; the event that is recorded after it tells when it is there."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return copy.copy_(tensor, non_blocking=True)


def _token_logprobs(
    logprobs: Logprobs | None, rows: Sequence[ChoiceRow], tokens: Sequence[int]
) -> dict[int, TokenLogprob]:
    if logprobs is None:
        return {}
    by_place = {}
    chosen, top_ids, top = logprobs.chosen.tolist(), logprobs.top_ids.tolist(), logprobs.top.tolist()
    for number, place in enumerate(logprobs.places):
        wanted = rows[place].prompt.sampling.top_logprobs or 0
        alternatives = tuple(zip(top_ids[number][:wanted], top[number][:wanted], strict=True))
        by_place[place] = TokenLogprob(tokens[place], chosen[number], alternatives)
    return by_place
