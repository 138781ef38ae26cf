"""Penalties that follow what sequences generate, against counts kept of every token."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from batchmill.jobs.requests.generation import SamplingParams
from batchmill.worker.engine.sampling.penalties import LEAST_PLACES, Penalties

CPU = torch.device("cpu")
VOCABULARY = 9
SEATS = 4


@dataclass
class Plain:
    """One sequence, penalised by the formulas."""

    sampling: SamplingParams
    prompt: list[int]
    generated: list[int] = field(default_factory=list)

    def penalised(self, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        repetition = self.sampling.repetition_penalty or 1.0
        for token in {*self.prompt, *self.generated}:
            scores[token] = scores[token] * repetition if scores[token] < 0 else scores[token] / repetition
        for token, count in Counter(self.generated).items():
            scores[token] -= (self.sampling.frequency_penalty or 0.0) * count + (self.sampling.presence_penalty or 0.0)
        return scores


SAMPLINGS = st.builds(
    SamplingParams,
    repetition_penalty=st.sampled_from([None, 0.5, 1.7]),
    presence_penalty=st.sampled_from([None, -1.0, 0.25]),
    frequency_penalty=st.sampled_from([None, -0.5, 2.0]),
)
TOKENS = st.lists(st.integers(0, VOCABULARY - 1), max_size=12)


@settings(max_examples=60)
@given(st.data())
def test_sequences_come_go_and_generate_in_any_company(data: st.DataObject) -> None:
    penalties = Penalties(batch_slots=SEATS, device=CPU)
    held: dict[int, Plain] = {}
    scores = torch.randn(SEATS, VOCABULARY, generator=torch.Generator().manual_seed(1))
    for _ in range(data.draw(st.integers(1, 12))):
        batch_slot = data.draw(st.integers(0, SEATS - 1))
        if held.pop(batch_slot, None):
            penalties.leave(batch_slot)
        else:
            held[batch_slot] = Plain(data.draw(SAMPLINGS), data.draw(TOKENS), data.draw(TOKENS))
            penalties.enter(batch_slot, held[batch_slot].sampling, held[batch_slot].prompt, held[batch_slot].generated)
        if held:
            batch_slots = np.array(data.draw(st.lists(st.sampled_from(sorted(held)), unique=True, min_size=1)))
            found = scores.clone()
            penalties.apply(found, np.flatnonzero(np.isin(np.arange(SEATS), batch_slots)), np.sort(batch_slots))
            wanted = [held[s].penalised(scores[s]) if s in batch_slots else scores[s] for s in range(SEATS)]
            torch.testing.assert_close(found, torch.stack(wanted))
            tokens = data.draw(
                st.lists(st.integers(0, VOCABULARY - 1), min_size=len(batch_slots), max_size=len(batch_slots))
            )
            penalties.record(batch_slots, torch.tensor(tokens))
            for each, token in zip(batch_slots.tolist(), tokens, strict=True):
                held[each].generated.append(token)


def test_lists_grow_with_long_answers() -> None:
    penalties = Penalties(batch_slots=2, device=CPU)
    long = Plain(SamplingParams(repetition_penalty=1.3, frequency_penalty=0.01), [1, 2])
    short = Plain(SamplingParams(presence_penalty=1.0), [])
    penalties.enter(0, long.sampling, long.prompt, [])
    penalties.enter(1, short.sampling, short.prompt, [])
    for step in range(3 * LEAST_PLACES):
        penalties.record(np.array([0]), torch.tensor([step * 7 % VOCABULARY]))
        long.generated.append(step * 7 % VOCABULARY)
    penalties.record(np.array([1, 0]), torch.tensor([4, 5]))
    short.generated.append(4)
    long.generated.append(5)
    scores = torch.randn(2, VOCABULARY, generator=torch.Generator().manual_seed(2))
    found = scores.clone()
    penalties.apply(found, np.array([0, 1]), np.array([0, 1]))
    torch.testing.assert_close(found, torch.stack([long.penalised(scores[0]), short.penalised(scores[1])]))


def test_minus_infinity_stays_what_it_is() -> None:
    penalties = Penalties(batch_slots=1, device=CPU)
    sampling = SamplingParams(repetition_penalty=1.5, presence_penalty=1.0, frequency_penalty=1.0)
    penalties.enter(0, sampling, [0], [1])
    scores = torch.full((1, 3), -torch.inf)
    penalties.apply(scores, np.array([0]), np.array([0]))
    assert scores.tolist() == [[-torch.inf] * 3]
