"""Models, and continuous engines over them."""

from __future__ import annotations

from typing import Any

import pytest

from batchmill.worker.engine.continuous.engine import ContinuousEngine
from batchmill.worker.engine.options import EngineOptions
from batchmill.worker.models.load import LoadedModel
from tests.support.models.continuous import Make
from tests.support.models.families import load_alphabet, load_family


@pytest.fixture(scope="module")
def alphabet() -> LoadedModel:
    return load_alphabet()


@pytest.fixture(scope="module")
def llama() -> LoadedModel:
    return load_family("llama-grouped")


@pytest.fixture(params=[False, True], ids=["in turn", "ahead"])
def make(request: pytest.FixtureRequest) -> Make:
    """Makes engines, which are closed at the end; they wait for each step's tokens, or launch the next one before."""

    def make_engine(
        model: LoadedModel, *, rows: int = 8, deterministic: bool = False, **given: Any
    ) -> ContinuousEngine:
        options = EngineOptions(max_rows=rows, deterministic=deterministic)
        engine = ContinuousEngine(model, options=options, ahead=request.param, **given)
        request.addfinalizer(engine.close)
        return engine

    return make_engine
