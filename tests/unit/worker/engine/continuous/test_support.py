"""Models that the continuous engine cannot serve: it says why, and `generate` serves them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from transformers import BloomConfig, Lfm2Config, Llama4TextConfig, LlamaConfig, MambaConfig, PreTrainedConfig

from batchmill.jobs.models.quantization import Kind, Quantization
from batchmill.jobs.models.spec import DEMO, ModelSpec
from batchmill.worker.engine.continuous.engine import ContinuousEngine
from batchmill.worker.engine.continuous.support import Unsupported
from batchmill.worker.engine.generate.engine import GenerateEngine
from batchmill.worker.engine.options import EngineOptions
from batchmill.worker.engine.transformers_kind import serve
from batchmill.worker.models.load import LoadedModel, load
from tests.support.models.continuous import key, prompt
from tests.support.models.families import CONTEXT_TOKENS, VOCABULARY, loaded

_SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_ROPE = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0, "original_max_position_embeddings": 64}
UNSUPPORTED: dict[str, tuple[Callable[[], PreTrainedConfig], str]] = {
    "state space": (
        lambda: MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2),
        "0 of its 2 layers",
    ),
    "attention of its own": (
        lambda: BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4),
        "0 of its",
    ),
    "convolutions": (
        lambda: Lfm2Config(**_SIZES, num_key_value_heads=2, layer_types=["conv", "full_attention"]),
        "1 of its 2 layers",
    ),
    "chunked attention": (
        lambda: Llama4TextConfig(
            **_SIZES,
            num_key_value_heads=2,
            head_dim=8,
            intermediate_size=32,
            intermediate_size_mlp=32,
            num_local_experts=2,
        ),
        "chunked_attention",
    ),
    "stretched positions": (
        lambda: LlamaConfig(
            **_SIZES, intermediate_size=32, max_position_embeddings=CONTEXT_TOKENS, rope_parameters=_ROPE
        ),
        "longest row",
    ),
}


@pytest.fixture(scope="module", params=UNSUPPORTED)
def unsupported(request: pytest.FixtureRequest) -> tuple[LoadedModel, str]:
    config, reason = UNSUPPORTED[request.param]
    return loaded(config()), reason


def test_a_model_that_it_cannot_serve_is_served_by_generate(unsupported: tuple[LoadedModel, str]) -> None:
    model, reason = unsupported
    with pytest.raises(Unsupported, match=reason):
        ContinuousEngine(model, options=EngineOptions())
    engine = serve(model, options=EngineOptions())
    assert isinstance(engine, GenerateEngine)
    engine.add(key(0), prompt(0, "x", max_tokens=3, ignore_eos=True))
    [output] = engine.step()
    assert output.completion_tokens == 3


def test_int8_is_refused_where_answers_have_to_be_deterministic() -> None:
    model = load(ModelSpec(DEMO, quantization=Quantization(Kind.INT8)), "cpu")
    with pytest.raises(Unsupported, match="outlier"):
        ContinuousEngine(model, options=EngineOptions(deterministic=True))
