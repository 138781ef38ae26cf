"""`batchmill models`: how its commands end, what they print, and a quantized copy that is used."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from batchmill.worker.cli.models import main
from tests.support.models.tiny import save_tiny_model
from tests.support.servers.hub_machine import MODEL, ROOT, Machine
from tests.support.servers.hub_server import Hub, Repository, serving

PIECE = 10 * 1024**2  # which the client writes at a time


@pytest.fixture
def hub() -> Iterator[Hub]:
    files = {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": b"x" * 3 * PIECE}
    with serving(Hub({MODEL: Repository.of(files)})) as served:
        yield served


@pytest.fixture
def machine(tmp_path: Path, hub: Hub) -> Machine:
    return Machine(tmp_path, hub.url)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


def invoke(*words: str | Path) -> Result:
    return CliRunner().invoke(main, [str(each) for each in words])


def test_a_pull_loads_no_torch(machine: Machine) -> None:
    code = (
        "import sys, batchmill.worker.cli.models, batchmill.worker.models.hub.repository; print('torch' in sys.modules)"
    )
    assert machine.run("-c", code).stdout == "False\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_pull_that_is_ended_ends_at_once_and_leaves_nothing_half(
    machine: Machine, hub: Hub, number: signal.Signals, code: int
) -> None:
    hub.stalls_after_bytes = PIECE + 1
    words = [sys.executable, "-m", "batchmill.worker", "models", "pull", MODEL]
    process = subprocess.Popen(
        words, env=machine.environment(), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    blobs = machine.cache / f"models--{MODEL.replace('/', '--')}" / "blobs"
    deadline = time.monotonic() + 60
    while not any(each.stat().st_size >= PIECE for each in blobs.glob("*.incomplete")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    began = time.monotonic()
    output, errors = process.communicate(timeout=60)
    assert time.monotonic() - began < 5
    assert process.returncode == code
    assert (output, errors) == ("", "batchmill: interrupted\n" if number is signal.SIGINT else "")
    assert not list(blobs.glob("*.incomplete"))
    hub.stalls_after_bytes = None
    hub.asked.clear()
    machine.pull()
    assert hub.fetched() == ["model.safetensors"]


def test_a_pull_shows_how_far_it_is_to_a_terminal_alone(machine: Machine) -> None:
    master, slave = os.openpty()
    termios.tcsetwinsize(slave, (24, 100))
    words = [sys.executable, "-m", "batchmill.worker", "models", "pull", MODEL]
    done = subprocess.run(
        words, env=machine.environment(), cwd=ROOT, stdout=subprocess.PIPE, stderr=slave, timeout=60, check=True
    )
    os.close(slave)
    shown = b""
    while b"commit" not in shown:
        shown += os.read(master, 65536)
    os.close(master)
    assert b"3 files to fetch, 30.0 MiB" in shown
    assert b"100%" in shown
    assert done.stdout.count(b"\n") == 1
    machine.home.joinpath("again").mkdir()
    quiet = Machine(machine.home / "again", machine.url).models("pull", MODEL)
    assert quiet.stderr.splitlines() == [f"{MODEL}: fetched (3 files, commit {'0' * 39}1)"]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["demo"], "there is nothing to fetch: demo is part of batchmill"),
        (["echo"], "there is nothing to fetch: echo is part of batchmill"),
        (["."], "there is nothing to fetch: . is a folder of this machine"),
        (["./none"], "there is no folder './none' here"),
        (["dmeo"], "'dmeo' is no folder here, no cached model and no org/name: did you mean demo?"),
        (["demo", "--revision", "x"], "--revision goes with a Hugging Face id"),
    ],
)
def test_what_cannot_be_pulled_is_refused(words: list[str], reason: str) -> None:
    done = invoke("pull", *words)
    assert done.exit_code == 2
    assert reason in done.stderr


def test_a_name_that_the_hub_cannot_have_is_refused(machine: Machine, hub: Hub) -> None:
    assert "this is no name of a repository; write ORG/NAME" in machine.refusal("some-org/some--model")
    assert hub.asked == []


def test_a_quantized_copy_is_saved_and_used(folder: Path, tmp_path: Path) -> None:
    done = invoke("quantize", folder, "copy", "-q", "nf4", "--device", "cpu")
    assert done.exit_code == 0, done.stderr
    figures, command = done.stdout.splitlines()
    assert figures.startswith("copy: ")
    assert " of weights in nf4, " in figures
    assert command == "use it with: batchmill run prompts.jsonl -m ./copy -q checkpoint"
    whole_bytes = (folder / "model.safetensors").stat().st_size
    assert (tmp_path / "copy" / "model.safetensors").stat().st_size < whole_bytes / 2
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "hello", "max_tokens": 4}\n')
    words = [*command.removeprefix("use it with: batchmill ").split(), "-o", "answers.jsonl", "--device", "cpu"]
    run = subprocess.run([sys.executable, "-m", "batchmill", *words], capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    assert json.loads((tmp_path / "answers.jsonl").read_text())["index"] == 0


def test_a_quantized_copy_tells_its_figures_as_json(folder: Path, tmp_path: Path) -> None:
    told = json.loads(invoke("quantize", folder, "copy", "-q", "int8", "--device", "cpu", "--json").stdout)
    assert told["weights_bytes"] == (tmp_path / "copy" / "model.safetensors").stat().st_size
    assert (told["model"], told["quantization"]) == (str(folder), "int8")
    assert (told["folder"], told["revision"]) == (str(tmp_path / "copy"), None)
    assert told["seconds"] > 0


@pytest.mark.parametrize("words", [("-q", "none"), ("-q", "checkpoint"), ("-q", "nf5"), ("-q", "nf4", "--device", "x")])
def test_a_copy_that_cannot_be_saved_is_refused(folder: Path, words: tuple[str, ...], tmp_path: Path) -> None:
    done = invoke("quantize", folder, "copy", *words)
    assert done.exit_code == 2
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "copy").exists()


def test_a_folder_that_holds_something_is_not_written_to(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "mine").touch()
    done = invoke("quantize", folder, "copy", "-q", "nf4", "--device", "cpu")
    assert done.exit_code == 2
    assert "copy is there already and not an empty folder; name another" in done.stderr
    assert [each.name for each in (tmp_path / "copy").iterdir()] == ["mine"]
