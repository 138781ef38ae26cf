"""Greedy answers of the continuous engine are those of transformers' `generate`, token for token, in float32."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

from batchmill.jobs.models.quantization import Kind, Quantization
from batchmill.jobs.models.spec import DEMO, ModelSpec
from batchmill.jobs.requests.generation import GenerationRequest, SamplingParams
from batchmill.jobs.requests.request import RequestKey
from batchmill.producer.requests.kinds import FORMS
from batchmill.producer.requests.lines import Lines
from batchmill.worker.engine.continuous.engine import ContinuousEngine
from batchmill.worker.engine.continuous.support import cache_shape
from batchmill.worker.engine.options import Dequantize, EngineOptions
from batchmill.worker.models.load import LoadedModel, load
from tests.support.models.families import FAMILIES, load_family
from tests.support.paths import ROOT

SHARED = "a beginning that many prompts have in common, "
PROMPTS = [
    "a",
    "some longer prompt, which is longer than the window of those models that have one",
    SHARED + "first",
    "xyz",
    SHARED + "second, which goes on for some time until it is longer than the others are",
    SHARED,
    "of middling length",
]
ANSWER_TOKENS = [1, 20, 7, 30, 12, 3, 25]
#: Small enough that rows are put back, for prompts as long as these.
SMALL_CACHE_TOKENS = 256
WAYS: dict[str, dict[str, Any]] = {
    "rows": {"rows": 7},
    "one row": {"rows": 1, "ahead": True},
    "pieces": {"rows": 4, "step_tokens": 9},
    "unshared": {"rows": 4, "share_prefixes": False, "ahead": True},
    "full": {"rows": 7, "cache_tokens": SMALL_CACHE_TOKENS},
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> LoadedModel:
    return load_family(request.param)


def generated(loaded: LoadedModel, prompt: str, tokens: int) -> list[int]:
    """The answer of transformers' own `generate`; no end token ends it."""
    generated_tokens = loaded.model.generate(
        torch.tensor([loaded.tokenizer.encode(prompt)]), max_new_tokens=tokens, do_sample=False, pad_token_id=2
    )
    answer: list[int] = generated_tokens[0, -tokens:].tolist()
    return answer


@pytest.fixture(scope="module")
def wanted(family: LoadedModel) -> list[list[int]]:
    return [generated(family, prompt, tokens) for prompt, tokens in zip(PROMPTS, ANSWER_TOKENS, strict=True)]


def answered(loaded: LoadedModel, *, rows: int, cache_tokens: int | None = None, **given: Any) -> list[list[int]]:
    """The tokens that the engine answers with."""
    found: dict[int, list[int]] = {}
    cache_bytes = None if cache_tokens is None else cache_tokens * cache_shape(loaded).token_bytes
    options = EngineOptions(max_rows=rows, cache_bytes=cache_bytes)
    with closing(ContinuousEngine(loaded, options=options, **given)) as engine:
        for index, (prompt, tokens) in enumerate(zip(PROMPTS, ANSWER_TOKENS, strict=True)):
            sampling = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
            engine.add(RequestKey("job", index), GenerationRequest(index, str(index), prompt=prompt, sampling=sampling))
        rows_of = {key.index: answer.rows[0] for key, answer in engine._answers.items()}
        while engine.waiting or engine.active:
            for output in engine.step():
                assert output.error is None
                found[output.key.index] = rows_of[output.key.index].generated
    return [found[index] for index in range(len(PROMPTS))]


@pytest.mark.parametrize("way", WAYS)
def test_greedy_tokens_are_those_of_generate(family: LoadedModel, wanted: list[list[int]], way: str) -> None:
    assert answered(family, **WAYS[way]) == wanted


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "step_tokens", "share", "cache_tokens", "ahead"),
    list(product([1, 2, 7], [1, 9, 64, 512], [True, False], [SMALL_CACHE_TOKENS, 4096], [True, False])),
)
def test_greedy_tokens_are_those_of_generate_in_every_way(
    family: LoadedModel,
    wanted: list[list[int]],
    rows: int,
    step_tokens: int,
    share: bool,
    cache_tokens: int,
    ahead: bool,
) -> None:
    found = answered(
        family, rows=rows, step_tokens=step_tokens, share_prefixes=share, cache_tokens=cache_tokens, ahead=ahead
    )
    assert found == wanted


EXAMPLES = ROOT / "examples" / "prompts.jsonl"
EXAMPLE_PROMPTS = 24


@pytest.mark.parametrize("kind", [Kind.NF4, Kind.FP4, Kind.INT8, Kind.NONE])
def test_the_demo_model_gives_the_answers_of_generate_in_every_quantization(kind: Kind) -> None:
    """One row at a time, and the weights as bitsandbytes has them: then transformers computes the same shapes."""
    loaded = load(ModelSpec(DEMO, quantization=Quantization(kind)), "cpu")
    lines = [json.loads(line) for line in EXAMPLES.read_text().splitlines()[:EXAMPLE_PROMPTS]]
    options = EngineOptions(max_rows=1, dequantize=Dequantize.NEVER)
    with closing(ContinuousEngine(loaded, options=options)) as engine:
        for index, line in enumerate(lines):
            request = Lines(FORMS.values()).request(line, index, adapter_of=lambda _model, adapter: adapter)
            sampling = SamplingParams(max_tokens=24, temperature=0.0)
            engine.add(RequestKey("job", index), replace(request, sampling=sampling))
        rows = [answer.rows[0] for answer in engine._answers.values()]
        wanted = [answer_of_generate(loaded, row.prompt.tokens) for row in rows]
        while engine.waiting or engine.active:
            engine.step()
    assert [row.generated for row in rows] == wanted


def answer_of_generate(loaded: LoadedModel, prompt: Sequence[int]) -> list[int]:
    """Up to 24 tokens and the end token."""
    generated_tokens = loaded.model.generate(
        torch.tensor([prompt]),
        max_new_tokens=24,
        do_sample=False,
        pad_token_id=loaded.pad_token_id,
        eos_token_id=list(loaded.end_token_ids),
    )
    answer: list[int] = generated_tokens[0, len(prompt) :].tolist()
    return answer
