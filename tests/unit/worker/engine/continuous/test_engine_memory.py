"""The continuous engine where memory runs out: smaller steps, or an error of the one request."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from batchmill.worker.engine.continuous.engine import ContinuousEngine
from batchmill.worker.engine.sampling.penalties import Penalties
from batchmill.worker.models.load import LoadedModel
from tests.support.models.continuous import Make, answers, error, key, prompt, said
from tests.support.models.families import CONTEXT_TOKENS


class Small:
    """A device that holds forwards of at most `tokens` tokens."""

    def __init__(self, engine: ContinuousEngine, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
        decoder = engine._decoder
        logits = decoder.logits

        def refusing(pieces: Any) -> torch.Tensor:
            if sum(piece.end - piece.begin for piece in pieces) > tokens:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return logits(pieces)

        monkeypatch.setattr(decoder, "logits", refusing)


def test_a_step_that_does_not_fit_is_tried_again_in_half(
    llama: LoadedModel, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [prompt(index, f"prompt {index}" * 3, ignore_eos=True) for index in range(6)]
    wanted = said(answers(make(llama), *requests))
    engine = make(llama, step_tokens=64)
    Small(engine, 10, monkeypatch)
    assert said(answers(engine, *requests)) == wanted
    assert engine.capacity.found is not None
    assert engine.capacity.found <= 10


def test_a_request_that_does_not_fit_alone_is_an_error_and_the_next_one_is_answered(
    llama: LoadedModel, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make(llama)
    with monkeypatch.context() as full:
        Small(engine, 0, full)
        [failed] = answers(engine, prompt(0, "x"))
    assert error(failed)[0] == "out_of_memory"
    assert answers(engine, prompt(1, "x"))[0].error is None


def test_a_request_for_whose_sampling_is_no_memory_is_an_error_beside_others_that_go_on(
    llama: LoadedModel, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has two rows, which enter in the same step as the others; the engine serves its like again later."""
    others = [prompt(index, f"prompt {index}" * 3) for index in range(3)]
    greedy = prompt(3, "greedy", n=2, presence_penalty=0.5)
    engine = make(llama)
    wanted = said(answers(make(llama), *others, greedy))
    with monkeypatch.context() as full:
        full.setattr(Penalties, "_make_room", no_memory)
        *fine, failed = answers(engine, *others, greedy)
    assert error(failed)[0] == "out_of_memory"
    assert said(fine) == wanted[:3]
    assert said(answers(engine, *others, greedy)) == wanted


def no_memory(*_: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_all_rows_can_have_the_whole_context_at_once(llama: LoadedModel, make: Make) -> None:
    engine = make(llama, rows=4, step_tokens=1_024)
    for index in range(4):
        engine.add(key(index), prompt(index, "abcd"[index] * 199, max_tokens=CONTEXT_TOKENS - 200, ignore_eos=True))
    outputs = []
    while engine.active or not outputs:
        outputs += engine.step()
        assert engine.waiting == 0
    assert [each.completion_tokens for each in outputs] == [CONTEXT_TOKENS - 200] * 4


def test_a_broken_device_is_no_lack_of_memory(llama: LoadedModel, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Any) -> torch.Tensor:
        raise RuntimeError("CUDA error: device-side assert triggered")

    engine = make(llama)
    monkeypatch.setattr(engine._decoder, "logits", broken)
    with pytest.raises(RuntimeError, match="device-side"):
        answers(engine, prompt(0, "x"))
