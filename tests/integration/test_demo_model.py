"""The bundled model through the whole line, quantized and not: its answers are right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from batchmill.jobs.configuration.settings import environment_of, load_settings
from batchmill.worker.demo.corpus import held_out_additions
from tests.integration.conftest import Mill

pytestmark = pytest.mark.xdist_group("demo model")
ADDITIONS = 300
LEAST_RIGHT = 0.95
MOST_LOST = 0.03


@pytest.fixture(scope="module")
def additions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A prompt file of additions that training never saw, and the right answers."""
    pairs = held_out_additions(ADDITIONS, seed=1)
    path = tmp_path_factory.mktemp("additions") / "additions.jsonl"
    lines = [{"messages": [{"role": "user", "content": question}], "max_tokens": 8} for question, _ in pairs]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path, [answer for _, answer in pairs]


@pytest.fixture(scope="module")
def share_right() -> dict[str, float]:
    """The share of right answers by quantization, as far as they have run."""
    return {}


def run_additions(folder: Path, file: Path, answers: list[str], quantization: str) -> tuple[float, dict[str, Any]]:
    """The share of right answers of `batchmill run`, and the status of its job."""
    environ = {**os.environ, **environment_of(load_settings(home=folder / "home"))}
    command = [sys.executable, "-m", "batchmill"]
    run = ["run", str(file), "-m", "demo", "-q", quantization, "--temperature", "0", "--device", "cpu"]
    done = subprocess.run([*command, *run], env=environ, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    texts = [json.loads(line)["text"] for line in done.stdout.splitlines()]
    status = subprocess.run([*command, "status", "--json"], env=environ, capture_output=True, text=True, check=True)
    right = sum(text.strip() == answer for text, answer in zip(texts, answers, strict=True))
    return right / len(answers), json.loads(status.stdout)


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_held_out_additions_are_answered_right(
    quantization: str,
    additions: tuple[Path, list[str]],
    share_right: dict[str, float],
    tmp_path: Path,
) -> None:
    file, answers = additions
    share_right[quantization], status = run_additions(tmp_path, file, answers, quantization)
    print(f"{quantization}: {share_right[quantization]:.1%} of {ADDITIONS} held-out additions are right")  # noqa: T201
    assert share_right[quantization] >= LEAST_RIGHT - (0 if quantization == "none" else MOST_LOST)
    assert share_right[quantization] >= share_right.get("none", 0.0) - MOST_LOST
    assert status["quantization"] == quantization
    assert status["counts"]["succeeded"] == ADDITIONS
    assert status["seconds"]["model_load"] > 0
    assert status["vram"]["weights_bytes"] > 0
    assert status["versions"]["bitsandbytes"]


def test_every_kind_of_request_through_one_worker(mill: Mill, tmp_path: Path) -> None:
    mill.start("worker", "-m", "demo", "-q", "nf4", "--device", "cpu")
    chat = {"messages": [{"role": "user", "content": "What is 20 + 30?"}]}
    lines: list[dict[str, Any]] = [
        chat | {"temperature": 0},
        chat | {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "seed": 7, "max_tokens": 4},
        chat | {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "seed": 7, "max_tokens": 4},
        {"prompt": "20 + 30 =", "temperature": 0, "stop": ["0"]},
        {"prompt": "20 + 30 =", "min_p": 0.1, "repetition_penalty": 1.1},
        {"prompt": "1 + " * 2_000},
        {"messages": [{"role": "function", "content": "x"}]},
    ]
    file = tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    mill.command("submit", file, "-m", "demo", "--wait", code=5)
    found = mill.results()
    assert found[0]["text"].strip() == "50"
    assert found[1]["text"] == found[2]["text"]
    assert "0" not in found[3]["text"]
    assert [line["error"] and line["error"]["code"] for line in found] == [
        None,
        None,
        None,
        None,
        None,
        "context_length_exceeded",
        "chat_template_error",
    ]
    assert mill.status()["sampling"]["max_tokens"] == 256
