"""The sampler on a GPU: the tokens that a CPU draws, and no wait for the device."""

from __future__ import annotations

import pytest
import torch

from batchmill.jobs.requests.generation import SamplingParams
from batchmill.worker.engine.sampling.sampler import Sampler

ROWS = 48


def entered(device: str, vocabulary: int) -> Sampler:
    sampler = Sampler(batch_slots=ROWS, vocabulary=vocabulary, device=torch.device(device))
    asked = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.8, top_p=0.9, min_tokens=4, logprobs=True, top_logprobs=3),
        SamplingParams(temperature=0.8, top_k=20, min_p=0.02, logit_bias=((3, 4.0),)),
        SamplingParams(temperature=1.2, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.2),
    ]
    for batch_slot in range(ROWS):
        sampling = SamplingParams(seed=batch_slot).over(asked[batch_slot % len(asked)])
        sampler.enter(batch_slot, sampling, prompt=range(batch_slot, batch_slot + 9), end_token_ids=(1, 2))
    return sampler


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
@pytest.mark.parametrize("vocabulary", [300, 128_256])
def test_a_gpu_draws_what_a_cpu_draws_and_nothing_waits_for_it(vocabulary: int) -> None:
    on_cpu, on_gpu = entered("cpu", vocabulary), entered("cuda", vocabulary)
    allowed = torch.full((ROWS, -(-vocabulary // 32)), -1, dtype=torch.int32)
    allowed[::7] = 0x0F0F0F0F
    masks = allowed.cuda()
    same = 0
    for step in range(6):
        logits = torch.randn(ROWS, vocabulary, generator=torch.Generator().manual_seed(step)) * 3
        there = logits.cuda()
        torch.cuda.set_sync_debug_mode("error")
        try:
            tokens = on_gpu.sample(range(ROWS), there, allowed=masks).tokens
        finally:
            torch.cuda.set_sync_debug_mode("default")
        same += int((tokens.cpu() == on_cpu.sample(range(ROWS), logits, allowed=allowed).tokens).sum())
    # The exponentials differ in their last bit; a draw that falls between two such sums is one in a hundred thousand.
    assert same >= 6 * ROWS - 2
