"""Fixtures of tests of the producer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.prompt_files import error, write


@pytest.fixture
def problem(tmp_path: Path) -> Callable[..., str]:
    """The message for a file of one bad line, after `file:1: `."""

    def read(line: bytes | dict[str, Any], *, name: str = "prompts.jsonl", **options: Any) -> str:
        data = line if isinstance(line, bytes) else json.dumps(line).encode()
        path = write(tmp_path, data, name)
        caught = error(path, **options)
        assert caught.count == 1
        [text] = caught.problems
        assert text.startswith(f"{path}:1: ")
        return text.removeprefix(f"{path}:1: ")

    return read
