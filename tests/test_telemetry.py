"""Memory: read, and remembered at its largest."""

from __future__ import annotations

import mmap

import psutil
import pytest

from jobs.schema import Memory
from worker.devices import DeviceInfo
from worker.telemetry import MemoryMeter, MemoryReader, Reading

CUDA = DeviceInfo("GPU", "GPU-1", 1000, "cuda:0")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """A CUDA device that says what a test writes here."""
    bytes_of = {"allocated": 0, "reserved": 0, "free": 0}
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda _: bytes_of["allocated"])
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda _: bytes_of["reserved"])
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (bytes_of["free"], 1000))
    return bytes_of


def test_a_cpu_reads_the_resident_bytes_of_the_process() -> None:
    reader = MemoryReader("cpu")
    before = reader.read()
    size = 32 * 2**20
    with mmap.mmap(-1, size) as held:
        held.write(b"x" * size)
        after = reader.read()
    assert before.allocated == before.reserved
    assert after.allocated - before.allocated > size // 2
    assert 0 < reader.available_bytes() <= psutil.virtual_memory().total


def test_cuda_reads_what_torch_allocated_and_reserved(cuda: dict[str, int]) -> None:
    cuda.update(allocated=300, reserved=400, free=500)
    reader = MemoryReader("cuda:0")
    assert reader.read() == Reading(300, 400)
    assert reader.available_bytes() == 600


def test_a_meter_gives_the_largest_of_what_was_observed_since_it_was_asked(cuda: dict[str, int]) -> None:
    meter = MemoryMeter(CUDA)
    meter.weights_bytes = 7

    def observe(*readings: tuple[int, int]) -> None:
        for allocated, reserved in readings:
            cuda.update(allocated=allocated, reserved=reserved)
            meter.observe()

    observe((10, 90), (30, 40), (20, 50))
    assert meter.take() == Memory(7, 30, 90, 1000)
    assert meter.take() == Memory(7, 20, 50, 1000), "nothing was observed since: the latest holds"
    observe((5, 50))
    assert meter.take() == Memory(7, 20, 50, 1000), "what was held when the interval began counts"
    assert meter.take() == Memory(7, 5, 50, 1000)
