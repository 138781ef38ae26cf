"""Tests that need a CUDA device; elsewhere they are skipped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.integration.conftest import mill

__all__ = ["mill"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))
