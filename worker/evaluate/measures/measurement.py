"""What was measured of one ModelSpec, how, and how it is written as JSON: values alone, nothing is measured here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from batchmill.jobs.models.spec import ModelSpec
from batchmill.worker.evaluate.measures.accuracy import Accuracy
from batchmill.worker.evaluate.measures.agreement import Agreement
from batchmill.worker.evaluate.measures.divergence import Divergence
from batchmill.worker.evaluate.measures.perplexity import PerplexityChange


@dataclass(frozen=True, slots=True)
class Measurement:
    """`weights_bytes`: of the loaded tensors. `peak_bytes`: what loading and answering added at most.

    `tokens_per_second`: generated, of all rows together; None where nothing was asked. `perplexity_change`,
    `divergence` and `agreement` are None for the baseline, and where it could not be measured. `commit`: what the
    revision resolved to. `identity`: what the model consisted of.
    """

    spec: ModelSpec
    perplexity: float
    perplexity_change: PerplexityChange | None
    divergence: Divergence | None
    agreement: Agreement | None
    accuracy: Accuracy | None
    weights_bytes: int
    peak_bytes: int
    tokens_per_second: float | None
    load_seconds: float
    engine: str | None
    commit: str | None
    identity: str

    def to_json(self) -> dict[str, Any]:
        """Everything but the spec and the identity."""
        accuracy = self.accuracy
        return {
            "perplexity": self.perplexity,
            "perplexity_change": None if self.perplexity_change is None else asdict(self.perplexity_change),
            "divergence": None if self.divergence is None else asdict(self.divergence),
            "agreement": None if self.agreement is None else asdict(self.agreement),
            "accuracy": None if accuracy is None else asdict(accuracy) | {"share": accuracy.share},
            "weights_bytes": self.weights_bytes,
            "peak_bytes": self.peak_bytes,
            "tokens_per_second": self.tokens_per_second,
            "load_seconds": self.load_seconds,
            "engine": self.engine,
            "commit": self.commit,
        }


@dataclass(frozen=True, slots=True)
class Method:
    """How it was measured, the same for every spec. `tokens`: those that were scored; `windows`: what was read.

    `divergence_places`: at how many of the scored tokens the distributions were compared.
    """

    window_tokens: int
    stride_tokens: int
    tokens: int
    windows: int
    divergence_places: int
    continuations: int
    max_tokens: int
    match: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Failure:
    """A spec that could not be measured, and why."""

    spec: ModelSpec
    reason: str


@dataclass(frozen=True, slots=True)
class Report:
    """An evaluation that has ended; `rows` in the order in which the specs were asked for.

    `method` is None where no model could be loaded.
    """

    baseline: ModelSpec
    data_name: str
    data_sha256: str
    device_name: str
    method: Method | None
    rows: tuple[Measurement | Failure, ...]
    versions: Mapping[str, str]

    @property
    def measured(self) -> tuple[Measurement, ...]:
        return tuple(each for each in self.rows if isinstance(each, Measurement))

    @property
    def failed(self) -> tuple[Failure, ...]:
        return tuple(each for each in self.rows if isinstance(each, Failure))

    @property
    def reference(self) -> Measurement | None:
        """The baseline's row, if it was measured."""
        return next((each for each in self.measured if each.spec == self.baseline), None)
