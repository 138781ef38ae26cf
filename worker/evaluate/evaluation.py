"""The loop over the ModelSpecs of an evaluation: load, read, answer, give back; one model in memory at a time.

Owns that order, and what the baseline leaves for the others. A spec that cannot be measured becomes a row with the
reason. It knows no store and no command line.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from batchmill.jobs.errors import BatchmillError, ModelError, UsageError
from batchmill.jobs.models.digests import Digests
from batchmill.jobs.models.spec import ModelSpec
from batchmill.worker.devices.selection import DeviceInfo
from batchmill.worker.engine.options import EngineOptions
from batchmill.worker.evaluate.data.corpus import Corpus
from batchmill.worker.evaluate.data.passages import Passages, Question
from batchmill.worker.evaluate.data.windows import Window, windows
from batchmill.worker.evaluate.lineup import Lineup
from batchmill.worker.evaluate.measures.accuracy import Match, accuracy
from batchmill.worker.evaluate.measures.agreement import agreement
from batchmill.worker.evaluate.measures.answers import Answers, answer
from batchmill.worker.evaluate.measures.divergence import Comparison, Distributions, Divergence
from batchmill.worker.evaluate.measures.measurement import Failure, Measurement, Method
from batchmill.worker.evaluate.measures.memory import PeakMemory, give_back
from batchmill.worker.evaluate.measures.perplexity import Perplexity, PerplexityChange
from batchmill.worker.evaluate.measures.scoring import scored
from batchmill.worker.evaluate.progress import ProgressBar
from batchmill.worker.models.load import LoadedModel, load
from batchmill.worker.models.reasons import reason
from batchmill.worker.plan.refusal import refuse_too_large

#: The default window, unless the model's context is shorter; the default stride is half a window.
WINDOW_TOKENS = 2_048


@dataclass(frozen=True, slots=True)
class Asked:
    """The user's options of an evaluation: how much is read and answered, and how."""

    tokens: int
    continuations: int
    max_tokens: int
    match: Match
    #: The scored tokens at which the distributions are compared, at most.
    divergence_places: int
    window_tokens: int | None = None
    stride_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class _Material:
    """The input of every model, made with the tokenizer of the first."""

    windows: Sequence[Window]
    questions: Sequence[Question]
    distributions: Distributions
    method: Method


class Evaluation:
    """The evaluation of a lineup on a corpus.

    `keep`: takes each measurement as soon as there is one. `digests`: those known of the model's files.
    """

    def __init__(
        self,
        lineup: Lineup,
        corpus: Corpus,
        asked: Asked,
        *,
        device: DeviceInfo,
        options: EngineOptions,
        digests: Digests,
        shown: ProgressBar,
        keep: Callable[[Measurement, Method, Measurement | None], None],
    ) -> None:
        self._lineup = lineup
        self._corpus = corpus
        self._asked = asked
        self._device = device
        self._options = options
        self._digests = digests
        self._shown = shown
        self._keep = keep
        self._work: _Material | None = None
        #: The baseline's, once it was measured.
        self._reference: Measurement | None = None
        self._perplexity: Perplexity | None = None
        self._answers: Answers | None = None

    @property
    def method(self) -> Method | None:
        """The method; None before a model was loaded."""
        return None if self._work is None else self._work.method

    def run(self) -> tuple[Measurement | Failure, ...]:
        """Measures each spec, in the lineup's order. Raises UsageError for data that the model cannot read."""
        try:
            rows = {spec: self._row(spec) for spec in self._lineup.order}
        finally:
            if self._work is not None:
                self._work.distributions.close()
        return tuple(rows[spec] for spec in self._lineup.specs)

    def _row(self, spec: ModelSpec) -> Measurement | Failure:
        self._shown.spec(spec.quantization.canonical)
        try:
            with _translated(spec):
                row = self._measured(spec, PeakMemory(self._device.torch_device))
        except ModelError as error:
            return Failure(spec, str(error))
        finally:
            give_back()
        if spec == self._lineup.baseline:
            self._reference = row
        assert self.method is not None
        self._keep(row, self.method, self._reference)
        return row

    def _measured(self, spec: ModelSpec, memory: PeakMemory) -> Measurement:
        with memory.watching():
            loaded = load(spec, self._device.torch_device, before_weights=refuse_too_large, digests=self._digests)
        work = self._work = self._work or self._prepared(loaded)
        perplexity, change, divergence = self._read(loaded, work)
        # Reading took buffers of its own, which a worker does not have.
        give_back()
        with memory.watching():
            answers = self._answer(loaded, work)
        agreed = right = None
        if answers is not None:
            before = None if self._answers is None else self._answers.texts
            right = accuracy(
                answers.texts, [each.answer for each in work.questions], self._asked.match, baseline=before
            )
            if spec == self._lineup.baseline:
                self._answers = answers
            elif self._answers is not None:
                agreed = agreement(self._answers.tokens, answers.tokens)
        return Measurement(
            spec,
            perplexity,
            change,
            divergence,
            agreed,
            right,
            loaded.weights_bytes,
            memory.peak_bytes,
            None if answers is None else answers.completion_tokens / answers.seconds,
            loaded.load_seconds,
            None if answers is None else answers.engine,
            loaded.commit,
            loaded.content.identity,
        )

    def _prepared(self, loaded: LoadedModel) -> _Material:
        asked = self._asked
        width, stride = _sizes(asked, loaded.context_tokens)
        passages = Passages(self._corpus, loaded)
        all_windows = windows(passages.scored(asked.tokens), width=width, stride=stride)
        tokens = sum(each.scored for each in all_windows)
        questions = passages.questions(
            asked.continuations, max_tokens=asked.max_tokens, context_tokens=loaded.context_tokens
        )
        distributions = Distributions(tokens, most=asked.divergence_places, vocabulary=loaded.vocabulary)
        if distributions.count < distributions.wanted:
            self._shown.say(
                f"the disk has room for the baseline's distributions at {distributions.count:,} of "
                f"{distributions.wanted:,} places; name a larger folder by TMPDIR"
            )
        method = Method(
            width,
            stride,
            tokens,
            len(all_windows),
            distributions.count,
            len(questions),
            asked.max_tokens,
            asked.match.value,
        )
        return _Material(all_windows, questions, distributions, method)

    def _read(self, loaded: LoadedModel, work: _Material) -> tuple[float, PerplexityChange | None, Divergence | None]:
        """Measures perplexity and the distances from the baseline; keeps the baseline's own distributions."""
        self._shown.phase("reading", work.method.tokens)
        is_baseline = loaded.spec == self._lineup.baseline
        comparison = None if is_baseline or self._reference is None else Comparison(work.distributions)
        takes = work.distributions.take if is_baseline else comparison.take if comparison is not None else None
        perplexity = Perplexity()
        for log_probs, targets in scored(loaded, work.windows):
            perplexity.take(log_probs, targets)
            if takes is not None:
                takes(log_probs)
            self._shown.reached(perplexity.tokens)
        divergence = None if comparison is None else comparison.result
        if not all(map(math.isfinite, (perplexity.value, *((divergence.mean, divergence.p99) if divergence else ())))):
            raise ModelError(
                f"{loaded.spec} holds a token of the text impossible, or gives no numbers: its numbers overflow in "
                f"{loaded.model.dtype}; choose another dtype or quantization"
            )
        if is_baseline:
            self._perplexity = perplexity
        change = None if self._reference is None or self._perplexity is None else perplexity.change(self._perplexity)
        return perplexity.value, change, divergence

    def _answer(self, loaded: LoadedModel, work: _Material) -> Answers | None:
        if not work.questions:
            return None
        self._shown.phase("answering", len(work.questions))
        return answer(loaded, work.questions, options=self._options, step=self._shown.reached)


def _sizes(asked: Asked, context_tokens: int | None) -> tuple[int, int]:
    """Window and stride, in tokens."""
    width = asked.window_tokens or min(WINDOW_TOKENS, context_tokens or WINDOW_TOKENS)
    if context_tokens is not None and width > context_tokens:
        raise UsageError(f"--context {width} is more than the {context_tokens:,} tokens that the model reads")
    stride = asked.stride_tokens or max(1, width // 2)
    if stride > width:
        raise UsageError(f"--stride {stride} leaves out tokens between windows of {width}: choose a smaller one")
    return width, stride


@contextmanager
def _translated(spec: ModelSpec) -> Iterator[None]:
    """Turns any exception of a library into a ModelError; batchmill's own pass."""
    try:
        yield
    except BatchmillError:
        raise
    except Exception as error:
        raise ModelError(f"cannot measure {spec}: {reason(error)}") from error
