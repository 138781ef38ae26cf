"""The choice among attention backends: one that raises or differs gives way to the next."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs

from batchmill.jobs.models.quantization import Kind, Quantization
from batchmill.jobs.models.spec import ModelSpec
from batchmill.worker.engine.continuous.attention import backends
from batchmill.worker.engine.continuous.attention.backends import BACKENDS, AttentionBackend, StepAttention
from batchmill.worker.engine.continuous.attention.cache import Cache
from batchmill.worker.engine.continuous.decoders import OpenDecoder, open_decoder
from batchmill.worker.engine.continuous.support import Unsupported, cache_shape
from batchmill.worker.engine.lora import Lora
from batchmill.worker.engine.options import EngineOptions
from batchmill.worker.engine.sizing import Load
from batchmill.worker.models.load import LoadedModel, load
from tests.support.models.tiny import save_tiny_model

SDPA = BACKENDS[-1]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = save_tiny_model(tmp_path_factory.mktemp("tiny"))
    return load(ModelSpec(str(folder), quantization=Quantization(Kind.NONE)), "cpu")


@pytest.fixture
def said() -> Iterator[list[MutableMapping[str, Any]]]:
    with capture_logs() as lines:
        yield lines


def opened(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, *found: AttentionBackend) -> OpenDecoder:
    monkeypatch.setattr(backends, "BACKENDS", found)
    shape = cache_shape(loaded)
    lora = Lora(loaded.model, loaded.adapters, device=loaded.device, fixed=False)
    options = EngineOptions(max_rows=3, context_tokens=50)
    return open_decoder(loaded, shape, Load.of(loaded, token_bytes=shape.token_bytes), options, lora=lora)


def raising(error: Exception) -> AttentionBackend:
    def build(*_: object) -> StepAttention:
        raise error

    return replace(SDPA, name="broken", build=build)


def doubled(*given: Any) -> StepAttention:
    """Attention of which every number is twice what it should be."""
    right = SDPA.build(*given)

    class Doubled:
        seconds = 0.0
        plan = staticmethod(right.plan)

        def __call__(self, *arguments: Any, **options: Any) -> tuple[torch.Tensor, None]:
            return 2 * right(*arguments, **options)[0], None

    return Doubled()


@pytest.mark.parametrize(
    ("broken", "because"),
    [
        (raising(TypeError("no argument seqused_k")), "TypeError: no argument seqused_k"),
        (replace(SDPA, name="broken", build=doubled), "of the broken attention on this device, its results are wrong"),
    ],
    ids=["raises", "differs"],
)
def test_the_next_is_tried_and_a_line_says_why(
    loaded: LoadedModel,
    monkeypatch: pytest.MonkeyPatch,
    said: list[MutableMapping[str, Any]],
    broken: AttentionBackend,
    because: str,
) -> None:
    found = opened(loaded, monkeypatch, broken, SDPA)
    assert found.backend is SDPA
    assert found.limits.rows == 3
    (line,) = said
    assert line["backend"] == "broken"
    assert line["because"].startswith(because)


def test_where_none_is_left_the_model_is_unsupported(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = replace(SDPA, build=doubled)
    with pytest.raises(Unsupported, match="of the sdpa attention on this device, its results are wrong by 100"):
        opened(loaded, monkeypatch, wrong)
    with pytest.raises(Unsupported, match="ValueError: no kernel"):
        opened(loaded, monkeypatch, raising(ValueError("no kernel")))


def test_one_that_does_not_qualify_is_not_tried(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, said: list[MutableMapping[str, Any]]
) -> None:
    other = replace(raising(AssertionError()), lacks=lambda _shape, _device: "another device")
    assert opened(loaded, monkeypatch, other, SDPA).backend is SDPA
    assert said == []


def test_memory_that_runs_out_is_no_fault_of_a_backend(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        opened(loaded, monkeypatch, raising(torch.OutOfMemoryError("out of memory")), SDPA)


def test_a_cache_ends_with_its_decoder(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second backend, or a model that is loaded again, has the memory for its own."""
    import gc
    import weakref

    caches: list[weakref.ref[Cache]] = []

    def build(cache: Cache, *given: Any) -> StepAttention:
        caches.append(weakref.ref(cache))
        return SDPA.build(cache, *given)

    found = opened(loaded, monkeypatch, replace(SDPA, build=build))
    assert caches[0]() is not None
    del found
    gc.collect()
    assert caches[0]() is None
