"""The choice of the engine for a model, and the options that it does not have."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import Any

import pytest
from structlog.testing import capture_logs

from batchmill.jobs.errors import ModelError
from batchmill.jobs.models.quantization import Kind, Quantization
from batchmill.jobs.models.spec import ModelSpec
from batchmill.worker.engine import Engine, transformers_kind
from batchmill.worker.engine.continuous.support import Unsupported
from batchmill.worker.engine.generate.engine import GenerateEngine
from batchmill.worker.engine.generate.sizing import GENERATE_ROWS
from batchmill.worker.engine.options import Dequantize, EngineChoice, EngineOptions
from batchmill.worker.engine.transformers_kind import serve
from batchmill.worker.models.load import LoadedModel, load
from tests.support.models.tiny import CONTEXT_TOKENS, save_tiny_model

REASON = "it keeps a state instead of a cache"


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = save_tiny_model(tmp_path_factory.mktemp("tiny"))
    return load(ModelSpec(str(folder), quantization=Quantization(Kind.NONE)), "cpu")


@pytest.fixture
def said() -> Iterator[list[MutableMapping[str, Any]]]:
    """The log lines of a choice."""
    with capture_logs() as lines:
        yield lines


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A continuous engine that cannot serve this model."""

    def refuse(loaded: LoadedModel, **_: object) -> None:
        raise Unsupported(REASON)

    monkeypatch.setattr(transformers_kind, "ContinuousEngine", refuse)


def chosen(loaded: LoadedModel, *, known_capacity: int | None = None, **asked: Any) -> Engine:
    return serve(loaded, options=EngineOptions(**asked), known_capacity=known_capacity)


@pytest.mark.parametrize("kind", [EngineChoice.AUTO, EngineChoice.CONTINUOUS])
def test_a_model_that_allows_it_gets_the_continuous_engine(loaded: LoadedModel, kind: EngineChoice) -> None:
    engine = chosen(loaded, kind=kind, max_rows=3, context_tokens=50)
    assert type(engine).__name__ == "ContinuousEngine"
    limits = engine.limits
    assert (limits.kind, limits.rows, limits.context_tokens) == ("continuous", 3, 50)
    assert limits.cache_tokens is not None
    assert limits.cache_tokens >= 50


@pytest.mark.usefixtures("refusing")
def test_another_model_gets_generate_and_one_line_says_why(
    loaded: LoadedModel, said: list[MutableMapping[str, Any]]
) -> None:
    engine = chosen(loaded, max_rows=3)
    assert isinstance(engine, GenerateEngine)
    limits = engine.limits
    assert (limits.kind, limits.rows, limits.context_tokens) == ("generate", 3, CONTEXT_TOKENS)
    assert [line["because"] for line in said] == [REASON]


@pytest.mark.usefixtures("refusing")
def test_a_model_that_cannot_have_the_engine_it_shall_have_is_refused(loaded: LoadedModel) -> None:
    with pytest.raises(ModelError, match=f"{REASON}; --engine auto"):
        chosen(loaded, kind=EngineChoice.CONTINUOUS)


def test_generate_is_taken_where_it_is_asked_for(loaded: LoadedModel, said: list[MutableMapping[str, Any]]) -> None:
    engine = chosen(loaded, kind=EngineChoice.GENERATE, known_capacity=1_000)
    assert isinstance(engine, GenerateEngine)
    assert (engine.limits.rows, engine.limits.cache_tokens) == (GENERATE_ROWS, 1_000)
    assert said == []


@pytest.mark.parametrize(("asked", "held"), [(50, 50), (10 * CONTEXT_TOKENS, CONTEXT_TOKENS), (None, CONTEXT_TOKENS)])
def test_a_context_is_at_most_what_is_asked_and_what_the_model_has(
    loaded: LoadedModel, asked: int | None, held: int
) -> None:
    for kind in EngineChoice:
        assert chosen(loaded, kind=kind, context_tokens=asked).limits.context_tokens == held


@pytest.mark.usefixtures("refusing")
@pytest.mark.parametrize(("kind", "why"), [(EngineChoice.AUTO, REASON), (EngineChoice.GENERATE, "--engine generate")])
def test_generate_never_answers_what_was_to_be_deterministic(loaded: LoadedModel, kind: EngineChoice, why: str) -> None:
    with pytest.raises(ModelError, match=f"--deterministic needs the continuous engine.*{why}"):
        chosen(loaded, kind=kind, deterministic=True)


def test_generate_says_that_it_makes_no_copies_of_weights(
    loaded: LoadedModel, said: list[MutableMapping[str, Any]]
) -> None:
    chosen(loaded, kind=EngineChoice.GENERATE, dequantize=Dequantize.ALWAYS)
    assert ["--dequantize always" in line["event"] for line in said] == [True]


def test_generate_says_that_it_has_no_cache_of_a_given_size(
    loaded: LoadedModel, said: list[MutableMapping[str, Any]]
) -> None:
    chosen(loaded, kind=EngineChoice.GENERATE, cache_bytes=2**20)
    assert ["cache_bytes" in line["event"] for line in said] == [True]
