"""A Hub on this machine, and a machine that asks it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.models.tiny import save_tiny_model
from tests.support.servers.hub_files import CLUTTER
from tests.support.servers.hub_machine import MODEL, Machine
from tests.support.servers.hub_server import Hub, Repository, files_of, serving


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return files_of(save_tiny_model(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def hub(files: dict[str, bytes]) -> Iterator[Hub]:
    with serving(Hub({MODEL: Repository.of(files | CLUTTER)})) as served:
        yield served


@pytest.fixture
def machine(tmp_path: Path, hub: Hub) -> Machine:
    return Machine(tmp_path, hub.url)
