"""Adapters on a GPU: rows of several beside the kernel and the graphs of the model alone."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from batchmill.jobs.models.adapters import Adapter
from batchmill.jobs.models.quantization import Kind, Quantization
from batchmill.jobs.models.spec import DEMO, ModelSpec
from batchmill.jobs.requests.generation import GenerationRequest, SamplingParams
from batchmill.jobs.requests.request import Output, RequestKey
from batchmill.worker.engine.continuous.engine import ContinuousEngine
from batchmill.worker.engine.options import Dequantize, EngineOptions
from batchmill.worker.models.adapters.loading import with_adapters
from batchmill.worker.models.load import LoadedModel, load
from tests.gpu.test_continuous import PROMPTS, on_cuda
from tests.support.models.lora import alone, greedy, save_random_adapter

NAMES = [None, "wide", "narrow", "wide"]
TOKENS = 20


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    config = on_cuda(torch.float32).model.config
    return {
        "wide": save_random_adapter(root / "wide", config, r=8, lora_alpha=64, seed=1),
        "narrow": save_random_adapter(root / "narrow", config, r=3, lora_alpha=20, seed=2, target_modules=["q_proj"]),
    }


def held(folders: dict[str, Path], dtype: torch.dtype) -> LoadedModel:
    return with_adapters(on_cuda(dtype), [Adapter(name, str(folder)) for name, folder in folders.items()])


def requests() -> list[GenerationRequest]:
    sampling = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True, logprobs=True)
    return [
        GenerationRequest(index, str(index), prompt=prompt, sampling=sampling, adapter=name)
        for index, (prompt, name) in enumerate(zip(PROMPTS, NAMES, strict=True))
    ]


def answered(engine: ContinuousEngine, chosen: Sequence[GenerationRequest]) -> dict[int, Output]:
    for each in chosen:
        engine.add(RequestKey("job", each.index), each)
    found: dict[int, Output] = {}
    while engine.waiting or engine.active:
        found.update((output.key.index, output) for output in engine.step())
    return found


def test_float32_rows_of_several_adapters_give_the_tokens_of_peft(folders: dict[str, Path]) -> None:
    model = held(folders, torch.float32)
    with closing(ContinuousEngine(model, options=EngineOptions(max_rows=8), step_tokens=64)) as engine:
        found = answered(engine, requests())
    for index, (prompt, name) in enumerate(zip(PROMPTS, NAMES, strict=True)):
        base = on_cuda(torch.float32)
        tokens = greedy(alone(base.model, folders[name] if name else None), base, base.tokenizer.encode(prompt), TOKENS)
        assert found[index].payload[0].text == base.tokenizer.decode(tokens, skip_special_tokens=True)


def test_graphs_hold_the_model_alone_before_and_after_steps_with_adapters(folders: dict[str, Path]) -> None:
    plain = [each for each in requests() if each.adapter is None]
    with closing(ContinuousEngine(on_cuda(torch.bfloat16), options=EngineOptions(max_rows=8))) as engine:
        wanted = answered(engine, plain)[0].payload
    with closing(ContinuousEngine(held(folders, torch.bfloat16), options=EngineOptions(max_rows=8))) as engine:
        graphs = engine._decoder._graphs
        assert graphs is not None
        tried = set(graphs._graphs)  # by the trial of the model
        answered(engine, [each for each in requests() if each.adapter == "wide"])
        assert set(graphs._graphs) == tried, "steps with adapters are launched"
        assert answered(engine, plain)[0].payload == wanted
        with_adapter = answered(engine, requests())
        assert with_adapter[1].payload != wanted
        assert answered(engine, plain)[0].payload == wanted


def test_deterministic_answers_do_not_depend_on_the_adapters_beside_them(folders: dict[str, Path]) -> None:
    model = held(folders, torch.bfloat16)
    options = EngineOptions(max_rows=4, deterministic=True)

    def said(chosen: Sequence[GenerationRequest]) -> dict[int, Any]:
        with closing(ContinuousEngine(model, options=options)) as engine:
            return {index: output.payload for index, output in answered(engine, chosen).items()}

    together = said(requests())
    for each in requests():
        assert said([each])[each.index] == together[each.index]


@pytest.mark.parametrize("kind", [Kind.NF4, Kind.INT8])
def test_adapters_over_quantized_weights_give_the_tokens_of_peft(kind: Kind, tmp_path: Path) -> None:
    def demo() -> LoadedModel:
        return load(ModelSpec(DEMO, quantization=Quantization(kind)), "cuda:0")

    folder = save_random_adapter(tmp_path / "adapter", demo().model.config, r=4, lora_alpha=4)
    model = with_adapters(demo(), [Adapter("a", str(folder))])
    options = EngineOptions(max_rows=1, dequantize=Dequantize.NEVER)
    asked = [replace(each, adapter="a") for each in requests()[:2]]
    with closing(ContinuousEngine(model, options=options)) as engine:
        found = answered(engine, asked)
    base = demo()
    peft = alone(base.model, folder)
    for each in asked:
        tokens = greedy(peft, base, base.tokenizer.encode(each.prompt), TOKENS)
        assert found[each.index].payload[0].text == base.tokenizer.decode(tokens, skip_special_tokens=True)
