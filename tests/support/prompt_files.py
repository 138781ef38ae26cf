"""Prompt files for tests: lines of each form, written, read and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from batchmill.jobs.errors import PromptFileError
from batchmill.jobs.requests.generation import GenerationRequest
from batchmill.producer.files.prompt_file import PromptFile

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "w", "parameters": {"type": "object"}}}
HELLO = {"role": "user", "content": "hello"}
GOOD = b'{"prompt":"fine"}\n'


def write(folder: Path, data: bytes, name: str = "prompts.jsonl") -> str:
    path = folder / name
    path.write_bytes(data)
    return str(path)


def requests(path: str, **options: Any) -> list[GenerationRequest]:
    with PromptFile(path, **options) as prompts:
        found = [line.request for line in prompts]
        prompts.raise_if_bad()
        return found


def error(path: str, **options: Any) -> PromptFileError:
    with pytest.raises(PromptFileError) as caught:
        requests(path, **options)
    return caught.value


def openai(body: dict[str, Any], url: Any = CHAT, **more: Any) -> dict[str, Any]:
    return {"custom_id": "a", "method": "POST", "url": url, "body": body} | more
