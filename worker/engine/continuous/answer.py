"""One request in the continuous engine: its rows, their tokens so far, and the Output at the end.

Owns the end of each row and the timings. It knows no cache and no device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from time import monotonic
from typing import TYPE_CHECKING

from batchmill.jobs.requests.generation import Choice
from batchmill.jobs.requests.request import ErrorCode, Output, RequestKey, Timings
from batchmill.worker.engine import not_a_number
from batchmill.worker.engine.continuous.scheduling.step import Row
from batchmill.worker.engine.text.stopping import StopWatch
from batchmill.worker.engine.text.token_logprobs import TokenLogprob, logprobs_of
from batchmill.worker.engine.text.tokenization import Prompt, Tokenization

if TYPE_CHECKING:
    from batchmill.worker.engine.grammar.grammars import Matcher


@dataclass(slots=True, eq=False)
class ChoiceRow(Row):
    """The row of one choice of an answer."""

    prompt: Prompt = field(kw_only=True)
    answer: Answer = field(kw_only=True)
    choice: int = field(kw_only=True)
    watch: StopWatch | None = field(kw_only=True)
    matcher: Matcher | None = field(kw_only=True)
    #: True once it has left the engine, complete or cancelled.
    ended: bool = field(default=False, kw_only=True)
    #: One entry a token, where they are asked for.
    logprobs: list[TokenLogprob] = field(default_factory=list, kw_only=True)

    @property
    def generated(self) -> list[int]:
        return self.tokens[self.prompt_tokens :]

    def take(self, token: int) -> bool:
        """Appends the row's next token. Returns True where it is the last one."""
        self.tokens.append(token)
        if self.matcher is not None:
            if not self.matcher.ended:
                self.matcher.advance(token)
            if self.matcher.ended:
                return True
        stopped = token in self.prompt.end_token_ids if self.watch is None else self.watch.ended_by(token)
        return stopped or len(self.tokens) == self.most_tokens


class Answer:
    """All choices of one request; `adapter`: the number of the adapter that computes them, 0 for none."""

    def __init__(
        self,
        key: RequestKey,
        prompt: Prompt,
        tokenization: Tokenization,
        *,
        matchers: Sequence[Matcher] = (),
        share: bool = True,
        adapter: int = 0,
    ) -> None:
        self.key = key
        self.prompt = prompt
        self._adapter = adapter
        self._tokenization = tokenization
        self._added = monotonic()
        self._began: float | None = None
        self._answered: float | None = None
        self._open = prompt.sampling.n or 1
        self.rows = [self._row(choice, matchers[choice] if matchers else None, share) for choice in range(self._open)]

    def _row(self, choice: int, matcher: Matcher | None, share: bool) -> ChoiceRow:
        prompt = self.prompt
        watch = StopWatch(prompt, self._tokenization) if prompt.stop else None
        return ChoiceRow(
            list(prompt.tokens),
            len(prompt.tokens) + prompt.max_tokens,
            share,
            self._adapter,
            prompt=prompt,
            answer=self,
            choice=choice,
            watch=watch,
            matcher=matcher,
        )

    def began(self) -> None:
        """Notes that a row has entered the device."""
        if self._began is None:
            self._began = monotonic()

    def token_came(self) -> None:
        """Notes that a row has a token; the first one ends the time to the first token."""
        if self._answered is None:
            self._answered = monotonic()

    def row_ended(self) -> bool:
        """Notes that a row has ended. Returns True where it was the last one."""
        self._open -= 1
        return self._open == 0

    def output(self, ended: float) -> Output:
        """Makes the Output of all rows, the last of which has ended at the time `ended`."""
        failure = next((row.matcher.failure for row in self.rows if row.matcher and row.matcher.failure), None)
        if failure is not None:
            return self._failed(ErrorCode.INVALID_RESPONSE_FORMAT, failure)
        assert self._began is not None, "rows that ended had begun"
        assert self._answered is not None, "rows that ended had a token"
        return Output(
            self.key,
            tuple(self._choice(row) for row in self.rows),
            len(self.prompt.tokens),
            sum(len(row.generated) for row in self.rows),
            timings=Timings(
                round(self._began - self._added, 6),
                round(self._answered - self._began, 6),
                round(ended - self._answered, 6),
            ),
        )

    def too_large(self) -> Output:
        """Makes the error of a request for which the device has not enough memory alone."""
        remedy = "choose a smaller --max-rows or --context for its worker"
        return self._failed(ErrorCode.OUT_OF_MEMORY, f"the device has not enough memory for it alone: {remedy}")

    def not_a_number(self, row: ChoiceRow) -> Output:
        """Makes the error of a row whose logits for the next token are no numbers."""
        return self._failed(ErrorCode.NOT_A_NUMBER, not_a_number(len(row.generated)))

    def _failed(self, code: ErrorCode, message: str) -> Output:
        return Output.failed(self.key, code, message, prompt_tokens=len(self.prompt.tokens))

    def _choice(self, row: ChoiceRow) -> Choice:
        choice = self._tokenization.choice(
            self.prompt,
            row.generated,
            named=f"{self.key.job_id}/{self.key.index}/{row.choice}",
            complete=row.matcher is not None and row.matcher.ended,
        )
        if not self.prompt.sampling.logprobs:
            return choice
        decoding = self._tokenization.decoding
        return replace(choice, logprobs=logprobs_of(row.logprobs, choice.text, decoding, after=self.prompt.tail))
