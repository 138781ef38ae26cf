"""An engine kind opens its own model: the order in which it does, and what is known of the opened engine."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from batchmill.jobs.configuration.settings import Settings, load_settings
from batchmill.jobs.errors import ModelError
from batchmill.jobs.models.adapters import Adapter
from batchmill.jobs.models.digests import Digests
from batchmill.jobs.models.engine_facts import EngineLimits
from batchmill.jobs.models.identity import of_echo
from batchmill.jobs.models.quantization import Kind, Quantization
from batchmill.jobs.models.spec import ECHO, ModelSpec
from batchmill.worker.devices.placement import Placement
from batchmill.worker.engine import Opening
from batchmill.worker.engine.echo.chaos import ChaosEngine
from batchmill.worker.engine.echo.engine import ECHO_ROWS, EchoEngine
from batchmill.worker.engine.options import EngineChoice, EngineOptions
from batchmill.worker.engine.registry import kind_of
from batchmill.worker.engine.transformers_kind import TransformersKind
from batchmill.worker.models.vetting import Refusal
from tests.support.models.tiny import CONTEXT_TOKENS, save_tiny_model

PLAIN = Quantization(Kind.NONE)


def fits(_spec: ModelSpec, _folder: Path, _device: torch.device) -> None:
    """Refuses nothing."""


def opening(spec: ModelSpec, **given: Any) -> Opening:
    order = Opening(
        spec,
        Placement(("cpu",)),
        ["cpu"],
        adapters=(),
        options=EngineOptions(),
        digests=Digests(),
        before_weights=fits,
        progress=lambda: False,
        known_capacity=None,
    )
    return replace(order, **given)


@pytest.fixture
def settings() -> Settings:
    return load_settings()


@pytest.fixture
def tiny(tmp_path: Path) -> ModelSpec:
    return ModelSpec(str(save_tiny_model(tmp_path)), quantization=PLAIN)


def test_the_model_decides_the_kind_and_echo_is_one(settings: Settings, tiny: ModelSpec) -> None:
    assert isinstance(kind_of(tiny, settings), TransformersKind)
    echo = opening(ModelSpec.parse(ECHO))
    assert type(kind_of(echo.spec, settings).open(echo).engine) is EchoEngine
    chaos = settings.model_copy(update={"chaos": True})
    assert type(kind_of(echo.spec, chaos).open(echo).engine) is ChaosEngine


def test_echo_holds_adapters_by_name_and_begins_with_what_its_device_held(settings: Settings) -> None:
    held = Adapter("a", "/adapters/a")
    order = opening(ModelSpec.parse(ECHO), adapters=[held], known_capacity=3)
    opened = kind_of(order.spec, settings).open(order)
    assert opened.facts.limits == EngineLimits(ECHO, ECHO_ROWS)
    assert (opened.facts.identity, opened.facts.adapters) == (of_echo().identity, (held,))
    assert opened.engine.capacity.limit == 3


@pytest.mark.parametrize("kind", [EngineChoice.AUTO, EngineChoice.GENERATE])
def test_the_facts_are_those_of_the_engine_and_its_model(tiny: ModelSpec, kind: EngineChoice) -> None:
    opened = TransformersKind().open(opening(tiny, options=EngineOptions(kind=kind, max_rows=4)))
    with closing(opened.engine):
        facts, engine = opened.facts, opened.engine
        assert facts.limits == engine.limits
        assert facts.limits.kind == ("generate" if kind is EngineChoice.GENERATE else "continuous")
        assert (facts.limits.rows, facts.limits.context_tokens) == (4, CONTEXT_TOKENS)
        assert facts.cache_by_device == (engine.cache_bytes,)
        assert facts.weights_by_device == (facts.weights_bytes,)
        assert facts.weights_bytes > 0
        assert facts.load_seconds > 0
        assert [each.identity for each in opened.sources] == [facts.identity]
        assert all(each in opened.sources for each in opened.read_at_work)


def test_a_model_that_does_not_fit_is_refused_before_its_weights_are_read(
    tiny: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(spec: ModelSpec, folder: Path, device: torch.device) -> None:
        assert (spec, str(folder), device) == (tiny, tiny.model, torch.device("cpu"))
        raise Refusal("it does not fit")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(ModelError, match="it does not fit"):
        TransformersKind().open(opening(tiny, before_weights=refuse))
