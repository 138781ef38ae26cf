"""The continuous engine on a GPU: its kernel and its graphs give what plain attention and plain launches give."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from typing import Any

import torch
from transformers import LlamaConfig

from batchmill.jobs.requests.generation import GenerationRequest, SamplingParams
from batchmill.jobs.requests.request import Output, RequestKey
from batchmill.worker.engine.continuous.attention.flash import FlashAttention
from batchmill.worker.engine.continuous.engine import ContinuousEngine
from batchmill.worker.engine.options import EngineOptions
from batchmill.worker.models.load import LoadedModel
from tests.support.models.families import loaded

PROMPTS = ["a", "some longer prompt of more words", "x" * 150, "medium length"]
VOCABULARY = 260


def on_cuda(dtype: torch.dtype) -> LoadedModel:
    model = loaded(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.3, bos_token_id=0, eos_token_id=1,
            pad_token_id=2,
        )
    )  # fmt: skip
    device = torch.device("cuda:0")
    return replace(model, model=model.model.to(device=device, dtype=dtype), device=device)


def answered(model: LoadedModel, *, graphs: bool = True, **given: Any) -> list[Output]:
    """Greedy answers with the logprobs of their tokens."""
    outputs: list[Output] = []
    with closing(ContinuousEngine(model, options=EngineOptions(max_rows=8), **given)) as engine:
        if not graphs:
            engine._decoder._graphs = None
        for index, text in enumerate(PROMPTS):
            sampling = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True, logprobs=True)
            engine.add(RequestKey("job", index), GenerationRequest(index, str(index), prompt=text, sampling=sampling))
        while engine.waiting or engine.active:
            outputs += engine.step()
    return sorted(outputs, key=lambda each: each.key.index)


def test_float32_gives_the_tokens_of_generate() -> None:
    model = on_cuda(torch.float32)
    for text, output in zip(PROMPTS, answered(model, step_tokens=64), strict=True):
        ids = torch.tensor([model.tokenizer.encode(text)], device="cuda")
        found = model.model.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=2)[0, -20:]
        assert output.payload[0].text == model.tokenizer.decode(found, skip_special_tokens=True)


def test_half_precision_runs_on_the_flash_kernel() -> None:
    model = on_cuda(torch.bfloat16)
    with closing(ContinuousEngine(model, options=EngineOptions(max_rows=8))) as engine:
        assert isinstance(engine._decoder._attention, FlashAttention)
    assert [each.completion_tokens for each in answered(model)] == [20] * len(PROMPTS)


def test_a_captured_step_gives_what_a_launched_one_gives() -> None:
    model = on_cuda(torch.bfloat16)
    assert [each.payload for each in answered(model)] == [each.payload for each in answered(model, graphs=False)]


def test_deterministic_answers_do_not_depend_on_company() -> None:
    model = on_cuda(torch.bfloat16)
    options = EngineOptions(max_rows=4, deterministic=True)

    def run(indices: range) -> dict[int, Any]:
        found = {}
        with closing(ContinuousEngine(model, options=options)) as engine:
            for index in indices:
                sampling = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True, logprobs=True)
                request = GenerationRequest(index, str(index), prompt=PROMPTS[index], sampling=sampling)
                engine.add(RequestKey("job", index), request)
            while engine.waiting or engine.active:
                found.update({output.key.index: output.payload for output in engine.step()})
        return found

    together = run(range(len(PROMPTS)))
    for index in range(len(PROMPTS)):
        assert run(range(index, index + 1))[index] == together[index]
