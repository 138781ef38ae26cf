"""A `run` never gives the answers of a model that is no more: whatever of its files was replaced since, and when."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from sqlalchemy import update
from transformers import LlamaConfig, LlamaForCausalLM

from batchmill.jobs.models.identity import differences
from batchmill.jobs.store.store import Store
from batchmill.jobs.store.tables import jobs
from tests.integration.conftest import Mill, until
from tests.support.models.lora import save_random_adapter
from tests.support.models.tiny import save_tiny_model
from tests.support.processes.home import Home, texts

WORDS = ["-q", "none", "--device", "cpu", "--temperature", "0", "--max-tokens", "12", "--ignore-eos"]


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    home = Home(tmp_path / "home")
    yield home
    home.end()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "model")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "p.jsonl", 3)


def write(path: Path, count: int, **more: Any) -> Path:
    lines = [{"messages": [{"role": "user", "content": f"say {index}"}], **more} for index in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def job_ids(home: Home) -> list[str]:
    return [each["id"] for each in json.loads(home.run("jobs", "--json").stdout)]


def other_weights(folder: Path) -> None:
    """The same configuration with weights of another training, saved over the ones that are there."""
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(folder))
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})


def other_tokenizer(folder: Path) -> None:
    written = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = written["model"]["vocab"]
    vocabulary |= {token: vocabulary[token.swapcase()] for token in map(chr, range(ord("a"), ord("z") + 1))} | {
        token: vocabulary[token.swapcase()] for token in map(chr, range(ord("A"), ord("Z") + 1))
    }
    (folder / "tokenizer.json").write_text(json.dumps(written))


def other_template(folder: Path) -> None:
    written = folder / "chat_template.jinja"
    written.write_text(written.read_text().replace("[assistant]", "[someone else]"))


def other_generation(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 3], "repetition_penalty": 3.0}))


def other_configuration(folder: Path) -> None:
    written = json.loads((folder / "config.json").read_text())
    written["rope_parameters"]["rope_theta"] = 1.0
    (folder / "config.json").write_text(json.dumps(written))


REPLACED: dict[str, tuple[str, Callable[[Path], None]]] = {
    "model.safetensors": ("weights", other_weights),
    "tokenizer.json": ("tokenizer", other_tokenizer),
    "chat_template.jinja": ("chat template", other_template),
    "generation_config.json": ("generation_config.json", other_generation),
    "config.json": ("configuration", other_configuration),
}


def answers(done: str) -> list[str]:
    return [json.loads(line)["text"] for line in done.splitlines()]


def test_replaced_files_make_another_model_and_the_old_ones_have_their_answers_back(
    home: Home, model: Path, file: Path
) -> None:
    first = home.run("run", file, "-m", model, *WORDS).stdout
    (old,) = job_ids(home)
    kept = {name: (model / name).read_bytes() for name in REPLACED}
    for _, replace in REPLACED.values():
        replace(model)
    done = home.run("run", file, "-m", model, *WORDS)
    (changed,) = (line for line in done.stderr.splitlines() if "ran this file with another model" in line)
    for called, _ in REPLACED.values():
        assert called in changed
    assert answers(done.stdout) != answers(first)
    for name, content in kept.items():
        (model / name).write_bytes(content)
    again = home.run("run", file, "-m", model, *WORDS)
    assert again.stdout == first
    assert f"job {old} ran this file before" in again.stderr
    assert len(job_ids(home)) == 2


@pytest.mark.slow
def test_each_replaced_file_makes_another_model(home: Home, model: Path, file: Path) -> None:
    first = home.run("run", file, "-m", model, *WORDS).stdout
    (old,) = job_ids(home)
    said = {"": answers(first)}
    for number, (name, (called, replace)) in enumerate(REPLACED.items(), 2):
        kept = (model / name).read_bytes()
        replace(model)
        done = home.run("run", file, "-m", model, *WORDS)
        assert f"ran this file with another model; changed since then: {called}" in done.stderr
        assert len(job_ids(home)) == number
        said[name] = answers(done.stdout)
        (model / name).write_bytes(kept)
    assert len({tuple(each) for each in said.values()}) == 1 + len(REPLACED)
    again = home.run("run", file, "-m", model, *WORDS)  # the old model is back, and so are its answers
    assert again.stdout == first
    assert f"job {old} ran this file before" in again.stderr


def test_touching_and_copying_files_makes_nothing_stale(home: Home, model: Path, file: Path) -> None:
    first = home.run("run", file, "-m", model, *WORDS).stdout
    for each in model.iterdir():
        content = each.read_bytes()
        each.unlink()
        each.write_bytes(content)
        os.utime(each, (1, 1))
    (model / "README.md").write_text("not read")
    done = home.run("run", file, "-m", model, *WORDS)
    assert done.stdout == first
    assert "ran this file before; --new runs it again" in done.stderr
    assert len(job_ids(home)) == 1


def test_an_interrupted_run_is_not_finished_by_another_model(home: Home, model: Path, tmp_path: Path) -> None:
    file, out = write(tmp_path / "many.jsonl", 400), tmp_path / "out.jsonl"
    words = ["run", file, "-m", model, *WORDS, "-o", out]
    process = home.start(*words, BATCHMILL_ENGINE_ROWS="2")
    until(lambda: home.succeeded() > 5, "some answers")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    kept = home.succeeded()
    assert 5 < kept < 400
    (old,) = job_ids(home)
    other_weights(model)
    done = home.run(*words)
    assert f"job {old} was started with another model; changed since then: weights (" in done.stderr
    mixed = texts(out)
    home.run(*words, "--new")
    assert mixed == texts(out)
    assert json.loads(home.run("status", old, "--json").stdout)["counts"]["succeeded"] == kept


def test_a_replaced_adapter_is_another_one_for_who_used_it(home: Home, model: Path, tmp_path: Path) -> None:
    folder, used, unused = tmp_path / "adapter", tmp_path / "used.jsonl", tmp_path / "unused.jsonl"
    save(folder, model, lora_alpha=64)
    write(used, 3, adapter="a")
    write(unused, 3)
    words = ["-m", model, *WORDS, "--adapter", f"a={folder}"]
    first = home.run("run", used, *words).stdout
    plain = home.run("run", unused, *words).stdout
    (_, old) = job_ids(home)
    save(folder, model, lora_alpha=128)
    done = home.run("run", used, *words)
    assert f"job {old} ran this file with another model; changed since then: adapter a (" in done.stderr
    assert answers(done.stdout) != answers(first)
    assert home.run("run", unused, *words).stdout == plain
    assert len(job_ids(home)) == 3


def save(folder: Path, model: Path, **asked: Any) -> None:
    save_random_adapter(folder, LlamaConfig.from_pretrained(model), **{"r": 4} | asked)


def test_a_finished_job_of_before_is_run_anew_and_says_so(home: Home, file: Path) -> None:
    home.run("run", file, "-m", "echo")
    (old,) = job_ids(home)
    store = Store(home.settings.database)
    with store.database.write() as connection:
        connection.execute(update(jobs).values(identity=None))
    store.close()
    done = home.run("run", file, "-m", "echo")
    assert f"job {old} ran this file before batchmill recorded model files; running the file" in done.stderr
    assert "--new" in home.run("run", file, "-m", "echo").stderr
    assert len(job_ids(home)) == 2


def test_a_file_written_under_a_worker_ends_it_and_none_of_its_answers_are_kept(
    home: Home, model: Path, tmp_path: Path
) -> None:
    """An unquantized model on a CPU computes with the file itself."""
    file, out = write(tmp_path / "many.jsonl", 400), tmp_path / "out.jsonl"
    words = ["run", file, "-m", model, *WORDS, "-o", out]
    process = home.start(*words, BATCHMILL_ENGINE_ROWS="2")
    until(lambda: home.succeeded() > 5, "some answers")
    weights = model / "model.safetensors"
    kept = weights.read_bytes()
    other = shutil.copytree(model, tmp_path / "other")
    other_weights(other)
    with weights.open("r+b") as opened:
        opened.write((other / "model.safetensors").read_bytes())
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "the model's files were written while it worked (weights); start the worker again" in said
    weights.write_bytes(kept)
    saved = home.succeeded()
    assert 5 < saved < 400
    home.run(*words)
    mixed = texts(out)
    home.run(*words, "--new")
    assert mixed == texts(out)


def test_a_live_worker_loads_the_files_that_were_replaced_before_it_begins_a_job(
    mill: Mill, model: Path, file: Path
) -> None:
    mill.start("worker", "-m", model, "-q", "nf4", "--device", "cpu")
    submit = ["submit", file, "-m", model, "-q", "nf4", "--temperature", "0", "--max-tokens", "12", "--ignore-eos"]
    old = mill.command(*submit).strip()
    until(lambda: mill.succeeded(old) == 3, "answers of the old model")
    other_weights(model)
    new = mill.command(*submit).strip()
    until(lambda: mill.succeeded(new) == 3, "answers of the new model")
    before, after = (answers(mill.command("results", each)) for each in (old, new))
    identities = [json.loads(mill.command("status", each, "--json"))["identity"] for each in (old, new)]
    assert before != after
    assert differences(*identities) == "weights"


def test_a_worker_with_another_model_leaves_the_job_and_doctor_says_what_changed(
    mill: Mill, model: Path, file: Path, tmp_path: Path
) -> None:
    worker = ["worker", "-m", model, "-q", "none", "--device", "cpu"]
    submit = ["-m", model, "-q", "none", "--temperature", "0", "--max-tokens", "12", "--ignore-eos"]
    old = mill.start(*worker, engine_rows=2)
    job = mill.command("submit", write(tmp_path / "many.jsonl", 400), *submit).strip()
    until(lambda: mill.succeeded(job) > 5, "some answers")
    old.send_signal(signal.SIGTERM)
    old.communicate(timeout=60)
    kept = mill.succeeded(job)
    assert 5 < kept < 400
    other_weights(model)
    mill.start(*worker)
    mill.command("submit", file, *submit, "--wait")  # a later job is begun, so that the worker holds its model
    said = mill.finished("doctor", job)
    assert said.returncode == 1, said.stdout
    assert f"job {job} is stuck: it was started with another model than worker " in said.stdout
    assert "holds; changed since then: weights\n  -> to finish it, restore the old model" in said.stdout
    assert f"`batchmill cancel {job}` and submit the file again" in said.stdout
    assert mill.succeeded(job) == kept
