"""The intake of requests: each is tokenized and gets its grammar, and becomes an Answer or is refused.

Owns the requests between their arrival and the schedule: those whose grammars are being compiled, and the outputs of
those that were refused. It knows no schedule and no cache.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

from batchmill.jobs.requests.generation import GenerationRequest
from batchmill.jobs.requests.request import Output, RequestKey
from batchmill.worker.engine.continuous.answer import Answer
from batchmill.worker.engine.grammar.grammars import Grammars, Matcher
from batchmill.worker.engine.grammar.matching import Matching
from batchmill.worker.engine.lora import Lora
from batchmill.worker.engine.refused import Refused
from batchmill.worker.engine.text.tokenization import Prompt, Tokenization


class Intake:
    """The requests of one engine that are not scheduled yet. `share`: their rows may have prefixes in common."""

    def __init__(self, tokenization: Tokenization, grammars: Grammars, lora: Lora, *, share: bool) -> None:
        self._tokenization = tokenization
        self._matching = Matching(grammars)
        self._lora = lora
        self._share = share
        self._refused: list[Output] = []

    def __len__(self) -> int:
        return len(self._matching) + len(self._refused)

    def take(self, key: RequestKey, request: GenerationRequest) -> Answer | None:
        """Makes the Answer of a request; None where it was refused, or where its grammar has to be compiled first."""
        with self._refusing(key):
            prompt = self._tokenization.prompt(request)
            if not prompt.sampling.response_format:
                return self._answer(key, prompt)
            self._matching.add(key, prompt)
        return None

    def compiled(self, *, seconds: float) -> Iterator[Answer]:
        """Yields the Answers whose grammars are compiled, after waiting up to `seconds` for the first."""
        for key, prompt, matchers in self._matching.ready(seconds=seconds):
            with self._refusing(key):
                yield self._answer(key, prompt, matchers.result())

    def refusals(self) -> list[Output]:
        """Hands over the outputs of the requests that were refused."""
        outputs, self._refused = self._refused, []
        return outputs

    def cancel(self, keys: Collection[RequestKey]) -> None:
        """Forgets these requests; unknown keys are ignored."""
        self._matching.cancel(keys)
        gone = set(keys)
        self._refused = [output for output in self._refused if output.key not in gone]

    def close(self) -> None:
        """Ends the thread that compiles grammars."""
        self._matching.close()

    def _answer(self, key: RequestKey, prompt: Prompt, matchers: Sequence[Matcher] = ()) -> Answer:
        adapter = self._lora.number(prompt.adapter)
        return Answer(key, prompt, self._tokenization, matchers=matchers, share=self._share, adapter=adapter)

    @contextmanager
    def _refusing(self, key: RequestKey) -> Iterator[None]:
        try:
            yield
        except Refused as refused:
            self._refused.append(Output.failed(key, refused.code, str(refused), prompt_tokens=refused.prompt_tokens))
