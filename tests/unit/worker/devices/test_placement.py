"""The placement of a model by flags: their meaning, and the message for each mistake."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from batchmill.jobs.errors import UsageError
from batchmill.worker.devices.placement import Placement, each_worker, parse_each, parse_max_memory

GIB = 2**30


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda:1", "GPU-5f1d9c60", "cuda:2+cuda:0"])
def test_devices_alone_are_a_whole_model_there_and_nowhere_else(device: str) -> None:
    placement = Placement.parse(device)
    assert placement.written == device
    assert not placement.offloads
    assert placement.plain == ("+" not in device)


def test_devices_are_known_to_the_process_by_their_order() -> None:
    placement = Placement.parse("cuda:3+GPU-5f1d+cuda:1")
    assert [placement.seen(each) for each in placement.names] == ["cuda:0", "cuda:1", "cuda:2"]
    assert placement.seen("cpu") == "cpu"
    assert Placement.parse("auto").seen("cuda:0") == "cuda:0"
    assert Placement.parse("cuda").written == "cuda:0"


@pytest.mark.parametrize(
    ("written", "count"),
    [("20GiB", 20 * GIB), ("1.5GiB", 3 * GIB // 2), ("60GB", 60 * 10**9), ("512 MiB", GIB // 2), ("2tb", 2 * 10**12)],
)
def test_memory_is_given_with_its_unit(written: str, count: int) -> None:
    assert parse_max_memory(f"cuda:0={written},cpu=1KB") == (("cuda:0", count), ("cpu", 1000))


def test_what_the_cpu_may_take_beside_a_gpu_lets_weights_wait_there() -> None:
    assert Placement.parse("cuda:0", max_memory="cuda:0=20GiB,cpu=60GiB").offload == "cpu"
    assert Placement.parse("cpu", max_memory="cpu=60GiB").offload is None


@pytest.mark.parametrize("workers", [["0"], ["cpu"], ["0+1", "2+3"], ["cuda:0", "GPU-aa+GPU-bb"]])
def test_devices_of_several_workers(workers: list[str]) -> None:
    placements = each_worker(",".join(workers))
    assert [each.replace("cuda:", "") for each in placements] == [each.replace("cuda:", "") for each in workers]


@pytest.mark.parametrize("written", ["0,0", "0+1,1+2", "0,", "", "0+", "0,cuda:0"])
def test_devices_that_two_workers_would_share_are_refused(written: str) -> None:
    with pytest.raises(UsageError, match="--devices takes different devices"):
        each_worker(written)


def test_each_of_several_workers_gets_what_is_said_of_its_own_devices() -> None:
    first, second = parse_each(each_worker("0+1,2+3"), max_memory="cuda:0=20GiB,cuda:3=1GB,cpu=60GiB")
    assert (first.max_memory, first.written) == ((("cuda:0", 20 * GIB), ("cpu", 60 * GIB)), "cuda:0+cuda:1")
    assert (second.max_memory, second.written) == ((("cuda:3", 10**9), ("cpu", 60 * GIB)), "cuda:2+cuda:3")


def test_a_device_that_no_worker_has_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match="--max-memory names cuda:4, and there are cuda:0, cuda:1, cpu here"):
        parse_each(["cuda:0", "cuda:1"], max_memory="cuda:4=1GiB")


def map_file(folder: Path, value: Any) -> str:
    file = folder / "map.json"
    file.write_text(value if isinstance(value, str) else json.dumps(value))
    return str(file)


def test_a_device_map_names_devices_as_they_were_given(tmp_path: Path) -> None:
    file = map_file(tmp_path, {"model.layers.0": "cuda:3", "model": "cuda:1", "lm_head": "cpu"})
    placement = Placement.parse("cuda:3+cuda:1", device_map=file)
    assert placement.device_map == (("model.layers.0", "cuda:3"), ("model", "cuda:1"), ("lm_head", "cpu"))
    assert placement.offloads
    assert not Placement.parse("cpu", device_map=map_file(tmp_path, {"": "cpu"})).offloads


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"lm_head": "cuda:2"}, "lm_head is on 'cuda:2', which is not among cuda:0, cuda:1, cpu, disk"),
        ({"": 0}, "the whole model is on 0, which is not among"),
        ({}, "must be an object"),
        (["cuda:0"], "must be an object"),
        ("{", "is no JSON"),
    ],
)
def test_a_device_map_that_is_none_is_named(value: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said):
        Placement.parse("cuda:0+cuda:1", device_map=map_file(tmp_path, value))


def test_a_device_map_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"missing.json: No such file"):
        Placement.parse("cuda:0", device_map=str(tmp_path / "missing.json"))


@pytest.mark.parametrize(
    ("device", "flags", "said"),
    [
        ("gpu", {}, "unknown device 'gpu'"),
        ("cuda:0+cpu", {}, "split over GPUs alone"),
        ("auto+cuda:1", {}, "split over GPUs alone"),
        ("cuda:1+cuda:1", {}, "named twice"),
        ("cuda:0", {"max_memory": "cuda:0"}, "--max-memory takes DEVICE=SIZE"),
        ("cuda:0", {"max_memory": "cuda:0=20"}, "--max-memory cuda:0: '20' is no size"),
        ("cuda:0", {"max_memory": "cuda:0=0GiB"}, "--max-memory cuda:0: '0GiB' is no size"),
        ("cuda:0", {"max_memory": "cuda:0=1GB,cuda:0=2GB"}, "--max-memory names cuda:0 twice"),
        ("cuda:0", {"max_memory": "cuda:1=1GB"}, "--max-memory names cuda:1"),
        ("cuda:0", {"max_memory": "tpu=1GB"}, "unknown device 'tpu'"),
        ("cpu", {"offload": "cpu"}, "on the CPU already; use --offload disk"),
        ("cuda:0", {"offload": "tape"}, "--offload takes cpu or disk"),
        ("cuda:0", {"offload": "disk"}, "--offload-folder"),
        ("cuda:0", {"offload_folder": "/tmp"}, "goes with --offload disk"),
    ],
)
def test_what_is_wrong_or_contradicts_is_refused(device: str, flags: dict[str, str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Placement.parse(device, **flags)


def test_a_device_map_says_it_all(tmp_path: Path) -> None:
    file = map_file(tmp_path, {"": "cuda:0"})
    with pytest.raises(UsageError, match="leave out --max-memory and --offload"):
        Placement.parse("cuda:0", device_map=file, offload="cpu")
    with pytest.raises(UsageError, match="--device-map places one model"):
        parse_each(["cuda:0", "cuda:1"], device_map=file)


def test_a_placement_survives_the_environment_and_the_command_line(tmp_path: Path) -> None:
    disk = {"offload": "disk", "offload_folder": str(tmp_path)}
    file = map_file(tmp_path, {"model": "cuda:0", "lm_head": "disk"})
    for placement in (
        Placement(),
        Placement.parse("cuda:1+cuda:2", max_memory="cuda:1=1.5GiB,cpu=2GB", **disk),
        Placement.parse("cuda:0", device_map=file, offload_folder=str(tmp_path)),
    ):
        assert Placement.from_json(placement.to_json()) == placement
        words = placement.command_line()
        flags = {name[2:].replace("-", "_"): value for name, value in zip(words[::2], words[1::2], strict=True)}
        assert Placement.parse(flags.pop("device"), **flags) == placement
