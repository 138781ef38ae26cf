"""Rotary embeddings that change with the length: each answer is what transformers' generate says to it alone."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, Phi3Config, PreTrainedConfig

from batchmill.jobs.requests.generation import GenerationRequest, SamplingParams
from batchmill.jobs.requests.request import Output, RequestKey
from batchmill.worker.engine.continuous.engine import ContinuousEngine
from batchmill.worker.engine.continuous.support import Unsupported
from batchmill.worker.engine.generate.engine import GenerateEngine
from batchmill.worker.engine.options import EngineOptions
from batchmill.worker.models.load import LoadedModel
from tests.support.models.families import loaded

ORIGINAL_TOKENS = 64
_SIZES = {
    "vocab_size": 260, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.3, "bos_token_id": 0,
    "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
_LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10_000.0, "short_factor": [1.0] * 6,
    "long_factor": [4.0, 8.0, 16.0, 20.0, 30.0, 40.0], "original_max_position_embeddings": ORIGINAL_TOKENS,
}  # fmt: skip
#: Tokens of a prompt and its answer: within the original length, up to it, across it, and beyond.
LENGTHS = [(53, 6), (71, 6), (10, 40), (30, 34), (60, 12), (63, 2), (64, 5), (65, 20), (8, 80), (40, 3), (120, 9)]


@pytest.fixture(
    scope="module",
    params=[
        # It reads the whole prompt anew where the factors change; the other one goes on with what it has.
        Phi3Config(**_SIZES, original_max_position_embeddings=ORIGINAL_TOKENS, rope_parameters=_LONGROPE),
        LlamaConfig(**_SIZES, rope_parameters=_LONGROPE | {"factor": 4.0}),
        LlamaConfig(**_SIZES, rope_parameters={"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}),
    ],
    ids=["phi3-longrope", "llama-longrope", "llama-dynamic"],
)
def model(request: pytest.FixtureRequest) -> LoadedModel:
    config: PreTrainedConfig = request.param
    return loaded(config)


def request(index: int, prompt_tokens: int, max_tokens: int) -> GenerationRequest:
    """A prompt of so many tokens, `<s>` included."""
    text = "".join(chr(ord("a") + (7 * index + place * place) % 26) for place in range(prompt_tokens - 1))
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    return GenerationRequest(index, str(index), prompt=text, sampling=sampling)


def alone(model: LoadedModel, asked: GenerationRequest) -> str:
    """The answer of transformers' `generate`."""
    ids = torch.tensor([model.tokenizer.encode(asked.prompt or "")])
    whole = model.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=asked.sampling.max_tokens, do_sample=False,
        pad_token_id=2,
    )  # fmt: skip
    text: str = model.tokenizer.decode(whole[0, ids.shape[1] :].tolist(), skip_special_tokens=True)
    return text


def answers(engine: GenerateEngine, *requests: GenerationRequest) -> list[Output]:
    for each in requests:
        engine.add(RequestKey("job", each.index), each)
    outputs: list[Output] = []
    while engine.waiting:
        outputs += engine.step()
    return sorted(outputs, key=lambda output: output.key.index)


def test_an_answer_does_not_depend_on_how_long_its_neighbours_are(model: LoadedModel) -> None:
    requests = [request(index, *lengths) for index, lengths in enumerate(LENGTHS)]
    outputs = answers(GenerateEngine(model, options=EngineOptions(max_rows=16)), *requests)
    assert [each.prompt_tokens for each in outputs] == [prompt_tokens for prompt_tokens, _ in LENGTHS]
    assert [each.payload[0].text for each in outputs] == [alone(model, each) for each in requests]


@pytest.mark.parametrize("lengths", [((58, 5), (40, 24)), ((60, 4), (55, 9)), ((62, 2), (50, 14))])
def test_a_shorter_neighbour_that_ends_at_the_original_length_is_not_scaled(
    model: LoadedModel, lengths: tuple[tuple[int, int], ...]
) -> None:
    """Padded to the longer prompt, its answer would go beyond that length."""
    requests = [request(index, *each) for index, each in enumerate(lengths)]
    outputs = answers(GenerateEngine(model, options=EngineOptions(max_rows=16)), *requests)
    assert [each.payload[0].text for each in outputs] == [alone(model, each) for each in requests]


def test_rows_that_turn_the_same_run_together(model: LoadedModel) -> None:
    engine = GenerateEngine(model, options=EngineOptions(max_rows=16))
    for index in range(8):
        long_or_short = request(index, 20, 10) if index % 2 else request(index, 100, 10)
        engine.add(RequestKey("job", index), long_or_short)
    steps = 0
    while engine.waiting:
        engine.step()
        steps += 1
    assert steps <= 2


def test_the_continuous_engine_takes_such_a_model_within_its_original_length_alone() -> None:
    config = Phi3Config(**_SIZES, original_max_position_embeddings=ORIGINAL_TOKENS, rope_parameters=_LONGROPE)
    with pytest.raises(Unsupported, match="longest row of a batch; with --context 64 it can be served"):
        ContinuousEngine(loaded(config), options=EngineOptions(max_rows=4))
