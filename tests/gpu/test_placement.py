"""Placement of a model on GPUs: pinned by index or UUID, refused beside another worker, split, offloaded, measured."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from batchmill.jobs.models.quantization import Quantization
from batchmill.jobs.models.spec import ModelSpec
from batchmill.worker.devices.placement import Placement
from batchmill.worker.devices.selection import describe_devices
from batchmill.worker.models.load import load
from tests.integration.conftest import Mill, until, write_prompts
from tests.support.models.tiny import save_tiny_model

SPEC = ("-m", "demo", "-q", "none")
TWO = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


def answer(mill: Mill, folder: Path, *, count: int = 200) -> None:
    file = write_prompts(folder / "p.jsonl", count)
    mill.command("submit", file, *SPEC, "--max-tokens", "64", "--temperature", "0", "--wait")


def test_a_uuid_pins_a_worker_and_every_number_of_its_device_is_recorded(mill: Mill, tmp_path: Path) -> None:
    (gpu,) = describe_devices(("cuda:0",))
    assert gpu.uuid is not None
    mill.start("worker", *SPEC, "--device", gpu.uuid)
    answer(mill, tmp_path)
    status = mill.status()
    (device,) = status["devices"]
    assert (device["uuid"], device["device"]) == (gpu.uuid, gpu.uuid)
    assert 0 < device["weights_bytes"] < device["peak_allocated_bytes"] <= device["peak_reserved_bytes"]
    assert device["weights_bytes"] + device["cache_bytes"] <= device["peak_allocated_bytes"]
    assert device["peak_reserved_bytes"] < device["free_at_start_bytes"] <= device["device_total_bytes"]
    assert device["weights_bytes"] < device["device_used_bytes"] <= device["device_total_bytes"]
    assert status["vram"]["peak_allocated_bytes"] == device["peak_allocated_bytes"]
    (worker,) = json.loads(mill.command("workers", "--json"))
    assert worker["devices"][0]["uuid"] == gpu.uuid
    assert worker["devices"][0]["weights_bytes"] == device["weights_bytes"]


def test_energy_is_recorded_where_nvml_counts_it(mill: Mill, tmp_path: Path) -> None:
    pynvml = pytest.importorskip("pynvml")
    pynvml.nvmlInit()
    try:
        pynvml.nvmlDeviceGetTotalEnergyConsumption(pynvml.nvmlDeviceGetHandleByIndex(0))
    except pynvml.NVMLError:
        pytest.skip("this GPU counts no energy")
    mill.start("worker", *SPEC, "--device", "cuda:0")
    answer(mill, tmp_path, count=20_000)
    assert mill.status()["energy_joules"] > 0


def test_two_workers_on_one_gpu_are_refused_unless_asked_for(mill: Mill) -> None:
    mill.start("worker", *SPEC, "--device", "cuda:0")
    until(lambda: any(each.engine for each in mill.store.workers.rows()), "the first worker is ready", seconds=300)
    second = mill.start("worker", *SPEC, "--device", "cuda:0")
    said, _ = second.communicate(timeout=300)
    assert second.returncode != 0
    assert "another worker holds the device GPU-" in said
    mill.start("worker", *SPEC, "--device", "cuda:0", "--share-device")
    until(lambda: sum(bool(each.engine) for each in mill.store.workers.rows()) == 2, "both are ready", seconds=300)


def test_a_mask_that_is_set_is_composed_with_the_uuid(
    mill: Mill, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (gpu,) = describe_devices(("cuda:0",))
    assert gpu.uuid is not None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES", "0"))
    mill.start("worker", *SPEC, "--device", gpu.uuid)
    answer(mill, tmp_path, count=10)
    assert mill.status()["devices"][0]["uuid"] == gpu.uuid


@pytest.mark.parametrize(("quantization", "room"), [("none", "400KB"), ("int8:fp32_cpu_offload=true", "200KB")])
def test_what_does_not_fit_waits_in_the_cpus_memory(tmp_path: Path, quantization: str, room: str) -> None:
    folder = save_tiny_model(tmp_path / "tiny")
    spec, plain = (ModelSpec(str(folder), quantization=Quantization.parse(each)) for each in (quantization, "none"))
    loaded = load(spec, "cuda:0", placement=Placement.parse("cuda:0", max_memory=f"cuda:0={room},cpu=1GiB"))
    ids = torch.arange(16)[None]
    with torch.inference_mode():
        found = loaded.model(input_ids=ids.cuda()).logits.float().cpu()
        wanted = load(plain, "cpu").model(input_ids=ids).logits
    assert loaded.layout.offloaded
    assert (found - wanted).abs().max() < 0.1 * wanted.abs().max()


@TWO
def test_one_model_is_split_over_two_gpus_and_both_are_locked(mill: Mill, tmp_path: Path) -> None:
    mill.start("worker", *SPEC, "--device", "cuda:0+cuda:1")
    answer(mill, tmp_path)
    devices = mill.status()["devices"]
    assert len({each["uuid"] for each in devices}) == 2
    assert all(each["weights_bytes"] for each in devices)
    second = mill.start("worker", *SPEC, "--device", "cuda:1")
    assert "another worker holds the device" in second.communicate(timeout=300)[0]
