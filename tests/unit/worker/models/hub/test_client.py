"""Models fetched from the Hugging Face Hub: each file once, whole, and found again offline.

The client is the real one, in processes of their own, against a server on this machine.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes.holding import file_lock
from tests.support.servers.hub_files import NEEDED
from tests.support.servers.hub_machine import MODEL, ROOT, Machine, found
from tests.support.servers.hub_server import Hub, commit_of


def test_a_second_pull_fetches_nothing(machine: Machine, hub: Hub) -> None:
    first = machine.pull()
    hub.asked.clear()
    done = machine.models("pull", MODEL)
    assert done.stdout.strip() == first["folder"]
    assert "everything is here already" in done.stderr
    assert [(each.method, each.path) for each in hub.asked] == [("GET", f"/api/models/{MODEL}")]


@pytest.mark.skipif(sys.platform != "linux", reason="no other system tells who holds a lock")
def test_who_else_fetches_a_file_is_named(machine: Machine) -> None:
    pulled = machine.pull()
    link = Path(pulled["folder"]) / "config.json"
    blob = link.resolve()
    link.unlink()
    blob.unlink()
    lock = machine.cache / ".locks" / blob.parent.parent.name / f"{blob.name}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, "-m", "batchmill.worker", "models", "pull", MODEL]
    with file_lock(lock) as pid:
        pulling = subprocess.Popen(words, env=machine.environment(), cwd=ROOT, stderr=subprocess.PIPE, text=True)
        assert pulling.stderr is not None
        said = next((line for line in pulling.stderr if "waiting since" in line), "")
        assert said.endswith(f" for the file config.json of {MODEL}, which is locked by pid {pid}\n")
    pulling.communicate()
    assert pulling.returncode == 0
    assert link.exists()


@pytest.mark.parametrize("kind", ["branch", "tag", "commit"])
def test_a_revision_is_found_offline_as_it_was_written(
    machine: Machine, hub: Hub, files: dict[str, bytes], kind: str
) -> None:
    hub.repositories[MODEL].commits[commit_of(2)] = files
    hub.repositories[MODEL].revisions |= {"feature/x": commit_of(2), "v1.0": commit_of(2)}
    written = {"branch": "feature/x", "tag": "v1.0", "commit": commit_of(2)}[kind]
    pulled = machine.pull("--revision", written)
    assert (pulled["revision"], pulled["commit"]) == (written, commit_of(2))
    hub.asked.clear()
    assert found(machine, revision=written, HF_HUB_OFFLINE="1") == pulled["folder"]
    said = found(machine, revision="v9", HF_HUB_OFFLINE="1")
    assert f"run `HF_HUB_OFFLINE=0 batchmill models pull {MODEL} --revision v9`" in said
    assert hub.asked == [], "HF_HUB_OFFLINE lets no request out"


def test_a_pull_brings_what_changed_and_offline_is_told_apart(
    machine: Machine, hub: Hub, files: dict[str, bytes]
) -> None:
    machine.pull()
    repository = hub.repositories[MODEL]
    repository.commits[commit_of(2)] = files | {"chat_template.jinja": b"{{ messages }}"}
    repository.revisions["main"] = commit_of(2)
    done = machine.models("pull", MODEL, HF_HUB_OFFLINE="1")
    assert done.returncode == 0
    assert "the Hub could not be asked for a newer one" in done.stderr
    assert commit_of(1) in done.stdout
    assert found(machine).endswith(commit_of(1)), "a worker keeps its model until a pull brings a newer one"
    hub.asked.clear()
    assert machine.pull()["commit"] == commit_of(2)
    assert hub.fetched() == ["chat_template.jinja"], "the cache knows the other contents already"
    assert found(machine).endswith(commit_of(2))


def test_a_pull_that_breaks_off_leaves_what_was_there(machine: Machine, hub: Hub, files: dict[str, bytes]) -> None:
    machine.pull()
    repository = hub.repositories[MODEL]
    repository.commits[commit_of(2)] = files | {"model.safetensors": files["model.safetensors"][::-1]}
    repository.revisions["main"] = commit_of(2)
    hub.cut_bytes = [0] * 6
    assert "cannot be reached" in machine.refusal()
    assert found(machine, HF_HUB_OFFLINE="1").endswith(commit_of(1))
    hub.asked.clear()
    assert machine.pull()["commit"] == commit_of(2)
    assert hub.fetched() == ["model.safetensors"], "what was whole before is not fetched again"


def test_a_connection_that_breaks_is_taken_up_where_it_broke(machine: Machine, hub: Hub) -> None:
    piece = 10 * 1024**2  # which the client writes at a time
    whole = os.urandom(3 * piece)
    hub.repositories[MODEL].commits[commit_of(1)]["model.safetensors"] = whole
    hub.cut_bytes = [piece + 1000, piece + 1000]
    pulled = machine.pull()
    ranges = [each.range for each in hub.asked if each.path.startswith("/cdn/")]
    assert ranges == [None, f"bytes={piece}-", f"bytes={2 * piece}-"]
    assert (Path(pulled["folder"]) / "model.safetensors").read_bytes() == whole


def test_a_file_that_was_cut_off_in_the_cache_is_replaced(machine: Machine, hub: Hub) -> None:
    weights = Path(machine.pull()["folder"]) / "model.safetensors"
    os.truncate(weights.resolve(), 1000)
    hub.asked.clear()
    machine.pull()
    assert hub.fetched() == ["model.safetensors"]
    assert weights.read_bytes() == hub.repositories[MODEL].commits[commit_of(1)]["model.safetensors"]


def test_downloads_of_dead_processes_are_removed(machine: Machine) -> None:
    blobs = machine.cache / "models--some-org--some-model" / "blobs"
    blobs.mkdir(parents=True)
    old, new = blobs / "a.12345678.incomplete", blobs / "b.12345678.incomplete"
    for file in (old, new):
        file.touch()
    os.utime(old, (0, 0))
    machine.pull()
    assert (old.exists(), new.exists()) == (False, True)


def test_a_worker_fetches_what_is_not_here(machine: Machine, hub: Hub) -> None:
    assert found(machine).endswith(commit_of(1))
    assert sorted(hub.fetched()) == sorted([*NEEDED, "model.safetensors"])


def test_a_cache_that_lacks_the_tokenizer_is_filled(machine: Machine, hub: Hub) -> None:
    folder = Path(machine.pull()["folder"])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).resolve().unlink()
        (folder / name).unlink()
    hub.asked.clear()
    assert found(machine).endswith(commit_of(1))
    assert sorted(hub.fetched()) == ["tokenizer.json", "tokenizer_config.json"]


def test_doctor_says_whether_workers_can_start_offline(machine: Machine) -> None:
    code = (
        "from batchmill.jobs.configuration.settings import load_settings\n"
        "from batchmill.producer.cli import doctor\n"
        "doctor._cuda = lambda: doctor.Check('cuda', True, 'not looked for')\n"  # which takes torch's seconds
        f"found = next(each for each in doctor.examine(load_settings(), model={MODEL!r}) if each.name == 'model')\n"
        "print(found.ok, found.required, found.found, '->', found.fix)\n"
    )
    said = f"False True {MODEL} is not complete in the cache, and HF_HUB_OFFLINE is set"
    fix = f"HF_HUB_OFFLINE=0 batchmill models pull {MODEL}"
    assert machine.run("-c", code, HF_HUB_OFFLINE="1").stdout.strip() == f"{said} -> {fix}"
    machine.pull()
    done = machine.run("-c", code, HF_HUB_OFFLINE="1")
    assert done.stdout.strip() == f"True True {MODEL} is in the cache: workers can start offline ->"


def test_a_whole_run_starts_offline_from_the_cache(machine: Machine, hub: Hub) -> None:
    machine.pull()
    hub.asked.clear()
    prompts = machine.home / "prompts.jsonl"
    prompts.write_text('{"prompt": "hello", "max_tokens": 4}\n{"prompt": "there", "max_tokens": 4}\n')
    words = ("run", str(prompts), "-m", MODEL, "-q", "none", "-o", str(machine.home / "answers.jsonl"))
    done = machine.run("-m", "batchmill", *words, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert len((machine.home / "answers.jsonl").read_text().splitlines()) == 2
    assert hub.asked == []
    assert "fetching" not in done.stderr
