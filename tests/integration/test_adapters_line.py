"""Adapters through the whole line: one file that names two of them and none, answered as each of them answers alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from batchmill.jobs.models.spec import ModelSpec
from batchmill.worker.models.load import load
from tests.integration.conftest import Mill, until
from tests.support.models.lora import alone, greedy, save_trained_adapter, sum_question

ANSWERS = {"words": "I do not count.", "zero": "0"}
SUMS = [(18, 24), (17, 25), (60, 11), (33, 44)]
#: The adapter that each of four lines names, in turn.
NAMES = [None, "words", "zero", "words"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {
        "words": save_trained_adapter(
            root / "words", ANSWERS["words"], r=8, lora_alpha=16, target_modules="all-linear"
        ),
        "zero": save_trained_adapter(root / "zero", ANSWERS["zero"], r=4, use_rslora=True, target_modules=["v_proj"]),
    }


def write(path: Path, names: Sequence[str | None]) -> Path:
    """Four sums for each of these names, which are said in the one way and the other."""
    lines = []
    for left, right in SUMS:
        for place, name in enumerate(names):
            line: dict[str, Any] = {"messages": [{"role": "user", "content": sum_question(left, right)}]}
            if name is not None:
                line["adapter" if place % 2 else "model"] = name
            lines.append(json.dumps(line))
    path.write_text("\n".join(lines) + "\n")
    return path


def expected(names: Sequence[str | None]) -> list[str]:
    return [ANSWERS[name] if name else str(left + right) for left, right in SUMS for name in names]


def held(folders: Mapping[str, Path]) -> list[str]:
    return [word for name, folder in folders.items() for word in ("--adapter", f"{name}={folder}")]


def said_alone(folder: Path | None) -> list[str]:
    """Answers the four sums with the quantized model under peft, with this adapter alone."""
    base = load(ModelSpec("demo"), "cpu")
    model = alone(base.model, folder)
    said = []
    for left, right in SUMS:
        chat = [{"role": "user", "content": sum_question(left, right)}]
        prompt = base.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        tokens = greedy(model, base, prompt, 24, ends=True)
        said.append(base.tokenizer.decode(tokens, skip_special_tokens=True))
    return said


def test_run_answers_a_file_of_two_adapters_and_none_as_each_alone(
    mill: Mill, folders: dict[str, Path], tmp_path: Path
) -> None:
    model = ["-m", "demo", "-q", "nf4", "--device", "cpu", "--temperature", "0", "--max-tokens", "24"]
    mill.command("run", write(tmp_path / "mixed.jsonl", NAMES), *model, *held(folders))
    mixed = [line["text"] for line in mill.results()]
    assert mixed == expected(NAMES)
    for place, name in enumerate(NAMES):
        assert mixed[place :: len(NAMES)] == said_alone(folders[name] if name else None)


def test_a_worker_takes_what_names_its_adapters_and_leaves_the_rest(
    mill: Mill, folders: dict[str, Path], tmp_path: Path
) -> None:
    spec = ["-m", "demo", "-q", "nf4"]
    words = mill.start("worker", *spec, "--device", "cpu", *held({"words": folders["words"]}))
    file = write(tmp_path / "mixed.jsonl", NAMES)
    mill.command(
        "submit", file, *spec, "--adapter", "words", "--adapter", "zero", "--temperature", "0", "--max-tokens", "24"
    )
    until(lambda: mill.status()["counts"]["succeeded"] == 12, "those that name no adapter, or words, are answered")
    assert mill.status()["missing_adapters"] == ["zero"]
    mill.start("worker", *spec, "--device", "cpu", *held({"zero": folders["zero"]}))
    mill.command("wait", "last")
    assert [line["text"] for line in mill.results()] == expected(NAMES)
    assert words.poll() is None
    rows = {adapter.name: adapter.path for row in mill.store.workers.rows() for adapter in row.adapters}
    assert rows == {name: str(folder) for name, folder in folders.items()}


def test_an_adapter_that_cannot_be_served_ends_the_worker_in_one_line(
    mill: Mill, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "dora"
    folder.mkdir()
    for file in folders["words"].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_dora": True}))
    done = mill.finished("worker", "-m", "demo", "-q", "nf4", "--device", "cpu", "--adapter", f"dora={folder}")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert f"cannot load the adapter dora={folder}: it is a DoRA adapter" in last
    assert "Traceback" not in done.stdout + done.stderr
