"""Repositories of the Hub: the files that a model or an adapter needs, or the reason why it cannot be loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.servers.hub_files import CLUTTER, NEEDED
from tests.support.servers.hub_machine import MODEL, Machine, found
from tests.support.servers.hub_server import Hub, Repository, commit_of


def test_only_what_is_needed_is_fetched(machine: Machine, hub: Hub) -> None:
    pulled = machine.pull()
    assert sorted(hub.fetched()) == sorted([*NEEDED, "model.safetensors"])
    assert sorted(pulled["files"]) == sorted(hub.fetched())
    assert (pulled["model"], pulled["revision"], pulled["commit"]) == (MODEL, None, commit_of(1))
    folder = Path(pulled["folder"])
    assert folder == machine.cache / "models--some-org--some-model" / "snapshots" / commit_of(1)
    assert sorted(each.name for each in folder.iterdir()) == sorted(pulled["files"])
    assert pulled["bytes"] == pulled["fetched_bytes"] == sum(each.stat().st_size for each in folder.iterdir())


def test_of_an_index_the_named_shards_come_and_nothing_else(
    machine: Machine, hub: Hub, files: dict[str, bytes]
) -> None:
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    index = json.dumps({"weight_map": {"a": names[0], "b": names[1]}}).encode()
    weights = files["model.safetensors"]
    rest = {name: content for name, content in files.items() if name != "model.safetensors"}
    shards = {names[0]: weights, names[1]: weights + b" ", "model-00001-of-00003.safetensors": b"of another form"}
    hub.repositories[MODEL] = Repository.of(rest | shards | CLUTTER | {"model.safetensors.index.json": index})
    machine.pull()
    assert sorted(hub.fetched()) == sorted([*NEEDED, "model.safetensors.index.json", *names])
    hub.repositories[MODEL].commits[commit_of(2)] = {
        name: content for name, content in hub.repositories[MODEL].commits[commit_of(1)].items() if name != names[1]
    }
    assert f"it has no {names[1]}, which its model.safetensors.index.json names" in machine.refusal(
        MODEL, "--revision", commit_of(2)
    )


@pytest.mark.parametrize(
    ("held", "reason"),
    [
        ({"pytorch_model.bin": b"x" * 1000}, "its pickled ones are never fetched, since a pickle can run code"),
        ({"model.Q4_0.gguf": b"x" * 1000}, "it holds GGUF files alone"),
        ({"consolidated.safetensors": b"x" * 1000}, "it holds neither model.safetensors nor"),
        ({"original/model.safetensors": b"x" * 1000}, "it holds neither model.safetensors nor"),
        ({"model.safetensors": b"", "adapter_config.json": b"{}"}, "which of the two is meant nobody can tell"),
    ],
)
def test_what_cannot_be_loaded_is_refused_before_it_is_fetched(
    machine: Machine, hub: Hub, held: dict[str, bytes], reason: str
) -> None:
    hub.repositories[MODEL] = Repository.of({"config.json": b"{}"} | held)
    assert reason in machine.refusal()
    assert hub.fetched() == []


def test_a_repository_without_a_configuration_is_refused(machine: Machine, hub: Hub) -> None:
    hub.repositories[MODEL] = Repository.of({"model.safetensors": b"x"})
    assert "it holds no config.json" in machine.refusal()
    assert hub.fetched() == []


ADAPTER = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x" * 1000}


def test_an_adapter_is_fetched_alone(machine: Machine, hub: Hub) -> None:
    hub.repositories[MODEL] = Repository.of(ADAPTER | CLUTTER | {"tokenizer.json": b"{}", "optimizer.pt": b"x"})
    assert sorted(machine.pull()["files"]) == sorted(ADAPTER)
    assert sorted(hub.fetched()) == sorted(ADAPTER)
    hub.asked.clear()
    assert found(machine, revision="main", what="adapter", HF_HUB_OFFLINE="1").endswith(commit_of(1))
    assert hub.asked == []
    assert f"--adapter NAME={MODEL}" in found(machine)


def test_a_repository_without_safetensors_is_no_adapter(machine: Machine, hub: Hub) -> None:
    hub.repositories[MODEL] = Repository.of({"adapter_config.json": b"{}", "adapter_model.bin": b"a pickle"})
    assert "it has no adapter_model.safetensors; save it with peft" in found(machine, what="adapter")
    assert hub.fetched() == []


def test_headers_are_read_without_the_weights(machine: Machine, hub: Hub, files: dict[str, bytes]) -> None:
    code = (
        "import json\n"
        "from batchmill.worker.models.hub.repository import fetch_configuration, fetch_headers\n"
        f"headers = fetch_headers({MODEL!r}, None)\n"
        "found = {name: [each.dtype, each.shape, each.bytes] for name, each in headers.items()}\n"
        f"print(json.dumps([sorted(file.name for file in fetch_configuration({MODEL!r}, None).iterdir()), found]))\n"
    )
    done = machine.run("-c", code)
    names, tensors = json.loads(done.stdout)
    assert names == ["config.json"]
    assert tensors["lm_head.weight"] == ["F32", [260, 64], 260 * 64 * 4]
    assert sum(each[2] for each in tensors.values()) < len(files["model.safetensors"])
    ranges = [each.range for each in hub.asked if each.path.startswith("/cdn/")]
    assert ranges == ["bytes=0-100000"]
    machine.pull()
    hub.asked.clear()
    assert json.loads(machine.run("-c", code, HF_HUB_OFFLINE="1").stdout)[1] == tensors
    assert hub.asked == []
