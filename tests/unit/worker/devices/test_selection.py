"""Masks of CUDA devices, and what a process finds behind one."""

from __future__ import annotations

import subprocess
import sys

import pytest

from batchmill.jobs.errors import ModelError, UsageError
from batchmill.worker.devices import selection as devices
from batchmill.worker.devices.selection import all_cuda_devices, describe_devices, is_out_of_memory, visible_devices

MASKED = {"CUDA_VISIBLE_DEVICES": "2,GPU-5f1d, 7"}


@pytest.mark.parametrize(
    ("device", "mask"), [("auto", "0"), ("cuda", "0"), ("cuda:0", "0"), ("cuda:3", "3"), ("cpu", "")]
)
def test_without_a_mask_the_number_is_the_mask(device: str, mask: str) -> None:
    assert visible_devices((device,), {}) == mask


@pytest.mark.parametrize(
    ("device", "mask"), [("auto", "2"), ("cuda", "2"), ("cuda:1", "GPU-5f1d"), ("cuda:2", "7"), ("cpu", "")]
)
def test_a_number_counts_within_the_mask_that_is_set(device: str, mask: str) -> None:
    assert visible_devices((device,), MASKED) == mask


def test_a_number_beyond_the_mask_is_refused() -> None:
    with pytest.raises(UsageError, match=r"cuda:3 is beyond CUDA_VISIBLE_DEVICES='2,GPU-5f1d, 7', which shows 3"):
        visible_devices(("cuda:3",), MASKED)


@pytest.mark.parametrize("mask", ["", "-1", "-1,0"])
def test_a_mask_that_shows_nothing_leaves_the_cpu_to_auto_alone(mask: str) -> None:
    environ = {"CUDA_VISIBLE_DEVICES": mask}
    assert visible_devices(("auto",), environ) == ""
    with pytest.raises(UsageError, match="which shows 0"):
        visible_devices(("cuda",), environ)


def test_the_first_invalid_entry_ends_a_mask() -> None:
    with pytest.raises(UsageError, match="shows 1"):
        visible_devices(("cuda:1",), {"CUDA_VISIBLE_DEVICES": "4,-1,5"})


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:-1", "cuda:x", "0", "", "mps", "cuda:0 "])
def test_other_spellings_are_refused(device: str) -> None:
    with pytest.raises(UsageError, match="unknown device"):
        visible_devices((device,), {})


def test_cpu_is_described_without_torch() -> None:
    script = (
        "import sys; from batchmill.worker.devices.selection import describe_devices;"
        "from batchmill.worker.devices.memory import MemoryMeter;"
        "(device,) = describe_devices(('cpu',)); meter = MemoryMeter([device]); meter.observe(); meter.take();"
        "print(device.name, device.uuid, device.torch_device, device.total_bytes > 2**20, 'torch' in sys.modules)"
    )
    folder = devices.__file__.rsplit("/", 2)[0]
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=folder, check=True)
    assert said.stdout.split() == ["cpu", "None", "cpu", "True", "False"]


def test_cuda_that_is_not_there_is_an_error_and_auto_takes_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert [each.torch_device for each in describe_devices(("auto",))] == ["cpu"]
    with pytest.raises(ModelError, match=r"device cuda:1: torch .* sees no such CUDA device"):
        describe_devices(("cuda:1",))


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch sees two GPUs."""

    class Properties:
        name, total_memory = "NVIDIA Something", 24 * 2**30

        def __init__(self, place: int) -> None:
            self.uuid = f"5f1d-7{place}"

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_properties", Properties)


@pytest.mark.usefixtures("two_gpus")
def test_cuda_devices_are_told_by_their_uuids_and_called_as_their_user_does() -> None:
    found = describe_devices(("cuda:2", "GPU-5f1d-71"), {"CUDA_VISIBLE_DEVICES": "2,GPU-5f1d-71"})
    assert [(each.torch_device, each.uuid, each.written) for each in found] == [
        ("cuda:0", "GPU-5f1d-70", "cuda:2"),
        ("cuda:1", "GPU-5f1d-71", "GPU-5f1d-71"),
    ]
    assert (found[0].name, found[0].total_bytes) == ("NVIDIA Something", 24 * 2**30)
    (auto,) = describe_devices(("auto",), {"CUDA_VISIBLE_DEVICES": "0"})
    assert auto.written == "cuda:0"


@pytest.mark.usefixtures("two_gpus")
def test_a_part_of_a_gpu_is_told_by_what_its_mask_calls_it() -> None:
    (found,) = describe_devices(("cuda:0",), {"CUDA_VISIBLE_DEVICES": "MIG-aa/1/0"})
    assert found.uuid == "MIG-aa/1/0"


@pytest.mark.usefixtures("two_gpus")
def test_fewer_devices_than_were_asked_for_are_an_error() -> None:
    with pytest.raises(ModelError, match=r"cuda:0\+cuda:1\+cuda:2: torch .* sees 2 CUDA devices"):
        describe_devices(("cuda:0", "cuda:1", "cuda:2"), {})


def test_several_devices_are_one_mask_in_their_order() -> None:
    assert visible_devices(("cuda:3", "cuda:1"), {}) == "3,1"
    assert visible_devices(("cuda:2", "cuda:0"), MASKED) == "7,2"


def test_one_device_under_two_names_is_refused() -> None:
    with pytest.raises(UsageError, match="not different devices"):
        visible_devices(("cuda:1", "GPU-5f1d"), MASKED)


@pytest.mark.parametrize("uuid", ["GPU-5f1d9c60-7744", "MIG-aa", "MIG-GPU-5f1d/1/0"])
def test_without_a_mask_a_uuid_is_the_mask(uuid: str) -> None:
    assert visible_devices((uuid,), {}) == uuid


@pytest.mark.parametrize(
    ("uuid", "mask", "shown"),
    [
        ("GPU-5f1d", "2,GPU-5f1d,7", "GPU-5f1d"),
        ("GPU-5f1d9c60", "GPU-5f1d,GPU-77", "GPU-5f1d9c60"),
        ("GPU-5f1d", "GPU-5f1d9c60-7744,GPU-77", "GPU-5f1d9c60-7744"),
        ("MIG-aa", "MIG-aabb,MIG-cc", "MIG-aabb"),
    ],
)
def test_a_uuid_is_found_in_a_mask_by_the_beginning_of_either(uuid: str, mask: str, shown: str) -> None:
    assert visible_devices((uuid,), {"CUDA_VISIBLE_DEVICES": mask}) == shown


@pytest.mark.parametrize(
    ("uuid", "mask", "said"),
    [
        ("GPU-99", "GPU-5f1d,GPU-77", "GPU-99 is no device of"),
        ("GPU-5f1d", "", "is no device of"),
        ("GPU-5", "GPU-5f1d,GPU-5f2e", "is more than one device of"),
    ],
)
def test_a_uuid_that_a_mask_does_not_show_is_refused(uuid: str, mask: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        visible_devices((uuid,), {"CUDA_VISIBLE_DEVICES": mask})


def test_what_the_numbers_of_a_mask_stand_for_is_asked_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_UUIDS", "print('aa11 bb22')")
    assert visible_devices(("GPU-bb",), {"CUDA_VISIBLE_DEVICES": "4,6"}) == "6"
    with pytest.raises(UsageError, match="GPU-cc is no device"):
        visible_devices(("GPU-cc",), {"CUDA_VISIBLE_DEVICES": "4,6"})


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
