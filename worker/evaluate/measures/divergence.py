"""The distance of next-token distributions from the baseline's: exact Kullback-Leibler divergence, in nats.

The baseline's distributions are whole and in float32, kept in a file that has no name and goes with the process. Read
in the order in which they were written, they take no memory. Owns the places at which they are kept: evenly spread, the
same for all.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from dataclasses import dataclass
from typing import BinaryIO, cast

import torch
from torch import Tensor

from batchmill.jobs.errors import BatchmillError
from batchmill.worker.evaluate.measures.perplexity import standard_error

_FLOAT32_BYTES = 4
#: The file takes at most one part in so many of the free space of the disk.
_DISK_PARTS = 2
_QUANTILE = 0.99


@dataclass(frozen=True, slots=True)
class Divergence:
    """KL(baseline || model) over places."""

    mean: float
    #: 99 in 100 places are below this.
    p99: float
    places: int
    #: Of the mean.
    standard_error: float | None


class Distributions:
    """The baseline's distributions, at `count` of `total` places.

    `most`: the places that are wanted. Fewer are kept where the disk under the folder for temporary files (TMPDIR)
    is too small.
    """

    def __init__(self, total: int, *, most: int, vocabulary: int) -> None:
        room = shutil.disk_usage(tempfile.gettempdir()).free // _DISK_PARTS // (_FLOAT32_BYTES * vocabulary)
        self.wanted = min(total, most)
        self.count = min(self.wanted, room)
        self._total = total
        self._file = cast(BinaryIO, tempfile.TemporaryFile())  # noqa: SIM115  # closed by `close`
        self._written = 0

    def take(self, log_probs: Tensor) -> None:
        """Keeps the wanted ones of the next places: float32 [places, vocabulary], natural logarithms."""
        kept = log_probs[self.places(self._written, len(log_probs))].contiguous().cpu()
        self._written += len(log_probs)
        try:
            self._file.write(kept.numpy().tobytes())
        except OSError as error:
            raise BatchmillError(
                f"cannot keep the baseline's distributions in {tempfile.gettempdir()}: {error.strerror}; "
                "name a larger folder by TMPDIR, or lower --kl-places"
            ) from error

    def places(self, begin: int, count: int) -> list[int]:
        """Returns the compared ones of the next `count` places, the first of which is the `begin`-th of all."""
        last = begin * self.count // self._total
        compared = []
        for number in range(count):
            reached = (begin + number + 1) * self.count // self._total
            if reached > last:
                compared.append(number)
            last = reached
        return compared

    def rewind(self) -> None:
        self._file.seek(0)

    def read(self, places: int, vocabulary: int) -> Tensor:
        """Reads the next distributions: float32 [places, vocabulary], on the CPU."""
        kept = bytearray(self._file.read(_FLOAT32_BYTES * places * vocabulary))
        return torch.frombuffer(kept, dtype=torch.float32).view(places, vocabulary)

    def close(self) -> None:
        self._file.close()


class Comparison:
    """One model's distance from the baseline, taken in the order in which the baseline's distributions were."""

    def __init__(self, baseline: Distributions) -> None:
        self._baseline = baseline
        self._nats: list[Tensor] = []
        self._seen = 0
        baseline.rewind()

    def take(self, log_probs: Tensor) -> None:
        """Compares the `log_probs` of the next places: float32 [places, vocabulary]."""
        places = self._baseline.places(self._seen, len(log_probs))
        self._seen += len(log_probs)
        if places:
            expected = self._baseline.read(len(places), log_probs.shape[1]).to(log_probs.device)
            self._nats.append(divergence(expected, log_probs[places]).cpu())

    @property
    def result(self) -> Divergence | None:
        """The divergence; None where no place could be kept."""
        if not self._nats:
            return None
        nats = torch.cat(self._nats)
        rank = min(len(nats), max(1, math.ceil(_QUANTILE * len(nats))))
        return Divergence(nats.mean().item(), nats.kthvalue(rank).values.item(), len(nats), standard_error(nats))


def divergence(expected: Tensor, found: Tensor) -> Tensor:
    """Computes KL(expected || found) of log-probabilities [places, vocabulary]: float64 [places], never negative.

    A token that `expected` holds impossible adds nothing; rounding below zero is cut off.
    """
    terms = expected.exp() * (expected - found)
    return terms.masked_fill_(expected == -math.inf, 0.0).sum(-1, dtype=torch.float64).clamp_(min=0.0)
