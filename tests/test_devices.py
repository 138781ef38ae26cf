"""Masks of CUDA devices, and what a process finds behind one."""

from __future__ import annotations

import subprocess
import sys

import pytest

from jobs.errors import ModelError, UsageError
from worker import devices
from worker.devices import all_cuda_devices, describe_device, is_out_of_memory, visible_devices

MASKED = {"CUDA_VISIBLE_DEVICES": "2,GPU-5f1d, 7"}


@pytest.mark.parametrize(
    ("device", "mask"), [("auto", "0"), ("cuda", "0"), ("cuda:0", "0"), ("cuda:3", "3"), ("cpu", "")]
)
def test_without_a_mask_the_number_is_the_mask(device: str, mask: str) -> None:
    assert visible_devices(device, {}) == mask


@pytest.mark.parametrize(
    ("device", "mask"), [("auto", "2"), ("cuda", "2"), ("cuda:1", "GPU-5f1d"), ("cuda:2", "7"), ("cpu", "")]
)
def test_a_number_counts_within_the_mask_that_is_set(device: str, mask: str) -> None:
    assert visible_devices(device, MASKED) == mask


def test_a_number_beyond_the_mask_is_refused() -> None:
    with pytest.raises(UsageError, match=r"cuda:3 is beyond CUDA_VISIBLE_DEVICES='2,GPU-5f1d, 7', which shows 3"):
        visible_devices("cuda:3", MASKED)


@pytest.mark.parametrize("mask", ["", "-1", "-1,0"])
def test_a_mask_that_shows_nothing_leaves_the_cpu_to_auto_alone(mask: str) -> None:
    environ = {"CUDA_VISIBLE_DEVICES": mask}
    assert visible_devices("auto", environ) == ""
    with pytest.raises(UsageError, match="which shows 0"):
        visible_devices("cuda", environ)


def test_the_first_invalid_entry_ends_a_mask() -> None:
    with pytest.raises(UsageError, match="shows 1"):
        visible_devices("cuda:1", {"CUDA_VISIBLE_DEVICES": "4,-1,5"})


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:-1", "cuda:x", "0", "", "mps", "cuda:0 "])
def test_other_spellings_are_refused(device: str) -> None:
    with pytest.raises(UsageError, match="unknown device"):
        visible_devices(device, {})


def test_cpu_is_described_without_torch() -> None:
    script = (
        "import sys; from worker.devices import describe_device; from worker.telemetry import MemoryMeter;"
        "device = describe_device('cpu'); meter = MemoryMeter(device); meter.observe();"
        "print(device.name, device.uuid, device.torch_device, device.total_bytes > 2**20, 'torch' in sys.modules)"
    )
    folder = devices.__file__.rsplit("/", 2)[0]
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=folder, check=True)
    assert said.stdout.split() == ["cpu", "None", "cpu", "True", "False"]


def test_cuda_that_is_not_there_is_an_error_and_auto_takes_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert describe_device("auto").torch_device == "cpu"
    with pytest.raises(ModelError, match=r"device cuda:1: torch .* sees no such CUDA device"):
        describe_device("cuda:1")


def test_a_cuda_device_is_told_by_its_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        name, uuid, total_memory = "NVIDIA Something", "5f1d-77", 24 * 2**30

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: Properties)
    found = describe_device("auto")
    assert (found.name, found.uuid, found.total_bytes, found.torch_device) == (
        "NVIDIA Something", "GPU-5f1d-77", 24 * 2**30, "cuda:0",
    )  # fmt: skip


def _answer(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    monkeypatch.setattr(devices, "_PROBE", script)


def test_devices_are_counted_by_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    _answer(monkeypatch, "print(2)")
    assert all_cuda_devices() == ["cuda:0", "cuda:1"]


@pytest.mark.parametrize(
    ("script", "message"),
    [("import no_such_module_of_torch", "torch is not installed"), ("raise SystemError('broken')", "broken")],
)
def test_a_count_that_fails_says_why(monkeypatch: pytest.MonkeyPatch, script: str, message: str) -> None:
    _answer(monkeypatch, script)
    with pytest.raises(ModelError, match=message):
        all_cuda_devices()


def _errors() -> list[tuple[BaseException, bool]]:
    import torch

    return [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), True),
        (RuntimeError("not enough memory: you tried to allocate 8 bytes"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
    ]


@pytest.mark.parametrize("place", range(6))
def test_a_lack_of_memory_is_told_from_other_failures(place: int) -> None:
    error, lack = _errors()[place]
    assert is_out_of_memory(error) is lack
