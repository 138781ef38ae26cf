"""Steps on a stand-in for a device whose copies arrive late: nothing is read before its event."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from batchmill.jobs.requests.generation import SamplingParams
from batchmill.worker.engine.continuous.answer import ChoiceRow
from batchmill.worker.engine.continuous.execution import executor
from batchmill.worker.engine.continuous.execution.executor import Executor, InFlightStep
from batchmill.worker.engine.continuous.scheduling.slots import Slot
from batchmill.worker.engine.continuous.scheduling.step import Copy, Piece, Step
from batchmill.worker.engine.sampling.sampler import Sampler
from batchmill.worker.engine.text.tokenization import Prompt

VOCABULARY = 16
#: The content of a copy that has not arrived.
NOTHING_YET = -99
CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")


class LateCopies:
    """Copies to the host that arrive when an event that was recorded after them is waited for."""

    def __init__(self) -> None:
        self._launched: list[tuple[torch.Tensor, torch.Tensor]] = []

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        copy = torch.full_like(tensor, NOTHING_YET)
        self._launched.append((copy, tensor))
        return copy

    def event(self) -> Any:
        launched = self._launched

        class Event:
            before: Sequence[tuple[torch.Tensor, torch.Tensor]] = ()

            def record(self) -> None:
                self.before = tuple(launched)

            def synchronize(self) -> None:
                for copy, tensor in self.before:
                    copy.copy_(tensor)

        return Event()


class Decoder:
    """A model whose next token is the newest one plus one; it notes its calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def copy(self, copies: Sequence[Copy]) -> None:
        self.calls.append(f"copies {len(copies)}")

    def logits(self, pieces: Sequence[Piece[ChoiceRow]]) -> torch.Tensor:
        self.calls.append(f"logits of {len(pieces)}")
        return self._after(torch.tensor([row.tokens[end - 1] for row, _, end in pieces]))

    def following(self, pieces: Sequence[Piece[ChoiceRow]], newest: torch.Tensor) -> torch.Tensor:
        self.calls.append(f"follows {len(pieces)}")
        assert len(pieces) == len(newest)
        return self._after(newest)

    def _after(self, tokens: torch.Tensor) -> torch.Tensor:
        return 5.0 * torch.nn.functional.one_hot((tokens + 1) % VOCABULARY, VOCABULARY)


@pytest.fixture
def decoder() -> Decoder:
    return Decoder()


@pytest.fixture
def device(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> Executor:
    copies = LateCopies()
    monkeypatch.setattr(executor, "_to_host", copies.to_host)
    monkeypatch.setattr(executor, "upload", lambda array, _device: torch.from_numpy(np.asarray(array)))
    monkeypatch.setattr(torch.cuda, "Event", copies.event)
    sampler = Sampler(batch_slots=4, vocabulary=VOCABULARY, device=CPU)
    return Executor(decoder, sampler, vocabulary=VOCABULARY, device=CUDA)  # type: ignore[arg-type]


def rows_of(*newest: int, logprobs: bool = False) -> list[ChoiceRow]:
    rows = []
    for place, token in enumerate(newest):
        sampling = SamplingParams(temperature=0.0, logprobs=logprobs, top_logprobs=2 if logprobs else None)
        prompt = Prompt([token], 8, sampling, [], frozenset(), ())
        row = ChoiceRow([token], 9, prompt=prompt, answer=None, choice=0, watch=None, matcher=None)  # type: ignore[arg-type]
        row.batch_slot, row.slot = place, Slot(16 * place, 16)
        rows.append(row)
    return rows


def step_of(rows: Sequence[ChoiceRow], *, entered: bool = False) -> Step[ChoiceRow]:
    pieces = [Piece(row, len(row.tokens) - 1, len(row.tokens)) for row in rows]
    return Step(pieces, entered=list(rows) if entered else [])


def tokens_of(in_flight: InFlightStep) -> list[int | None]:
    return [token for _, token, _ in in_flight.wait()]


def test_tokens_are_read_after_their_event(device: Executor, decoder: Decoder) -> None:
    step = step_of(rows_of(3, 7, 15), entered=True)
    assert device.enter(step) == []
    in_flight = device.launch(step)
    assert in_flight._copy.tolist() == [NOTHING_YET] * 3
    assert tokens_of(in_flight) == [4, 8, 0]
    assert decoder.calls == ["copies 0", "logits of 3"]


def test_logprobs_are_read_after_their_event(device: Executor) -> None:
    step = step_of(rows_of(3, 7, logprobs=True), entered=True)
    device.enter(step)
    found = [logprob for _, _, logprob in device.launch(step).wait()]
    assert [each.token for each in found if each is not None] == [4, 8]
    for each in found:
        assert each is not None
        assert -5.0 < each.logprob < 0.0
        assert each.logprob == each.top[0][1]


def test_a_step_launched_ahead_goes_on_from_tokens_that_have_not_arrived(device: Executor, decoder: Decoder) -> None:
    rows = rows_of(3, 7, 11)
    step = step_of(rows, entered=True)
    device.enter(step)
    first = device.launch(step)
    staying = [rows[0], rows[2]]
    second = device.launch_ahead(first, Step([Piece(row, 1, 2) for row in staying]))
    third = device.launch_ahead(second, Step([Piece(row, 2, 3) for row in staying]))
    assert decoder.calls[2:] == ["follows 2", "follows 2"]
    assert [tokens_of(each) for each in (first, second, third)] == [[4, 8, 12], [5, 13], [6, 14]]


def test_a_step_without_a_row_that_samples_has_nothing_to_wait_for(device: Executor) -> None:
    (row,) = rows_of(3)
    row.tokens += [4, 5]
    step = Step([Piece(row, 0, 2)], entered=[row])
    device.enter(step)
    assert tokens_of(device.launch(step)) == []
