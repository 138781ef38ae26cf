"""Memory and energy of devices: read, and remembered at their largest."""

from __future__ import annotations

import mmap
from typing import Any

import psutil
import pytest

from batchmill.jobs.models.device_memory import DeviceMemory, Memory
from batchmill.worker.devices import memory as telemetry
from batchmill.worker.devices.memory import MemoryMeter, MemoryReader, MemoryReading
from batchmill.worker.devices.nvml import Nvml
from batchmill.worker.devices.selection import DeviceInfo

FIRST = DeviceInfo("GPU", "GPU-1", 1000, "cuda:0", "cuda:2")
SECOND = DeviceInfo("GPU", "GPU-2", 2000, "cuda:1", "cuda:3")


class Gpu:
    """A CUDA device that says what a test writes here, and keeps its peaks as torch does."""

    def __init__(self) -> None:
        self.allocated = self.reserved = self.free = 0
        self.peaks = [0, 0]

    def hold(self, allocated: int, reserved: int) -> None:
        self.allocated, self.reserved = allocated, reserved
        self.peaks = [max(self.peaks[0], allocated), max(self.peaks[1], reserved)]

    def reset(self) -> None:
        self.peaks = [self.allocated, self.reserved]


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> dict[str, Gpu]:
    found = {"cuda:0": Gpu(), "cuda:1": Gpu()}
    for name, answer in {
        "memory_allocated": lambda gpu: gpu.allocated,
        "memory_reserved": lambda gpu: gpu.reserved,
        "max_memory_allocated": lambda gpu: gpu.peaks[0],
        "max_memory_reserved": lambda gpu: gpu.peaks[1],
        "reset_peak_memory_stats": Gpu.reset,
        "mem_get_info": lambda gpu: (gpu.free, 1000),
    }.items():
        monkeypatch.setattr(f"torch.cuda.{name}", lambda device, answer=answer: answer(found[device]))
    return found


class Clock:
    """The meter's clock, which a test sets."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(telemetry, "monotonic", clock)
    return clock


class Pynvml:
    """The part of the module pynvml that this project uses: two GPUs, whose use and energy a test sets."""

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        self.used: dict[str, int] = {"GPU-1": 700, "GPU-2": 900}
        self.millijoules: dict[str, int] = {"GPU-1": 5_000, "GPU-2": 8_000}
        self.questions = 0

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid not in self.used:
            raise self.NVMLError("Not Found")
        return uuid

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        self.questions += 1
        return type("Info", (), {"used": self.used[handle]})

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        if handle not in self.millijoules:
            raise self.NVMLError("Not Supported")
        return self.millijoules[handle]


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


def test_cuda_reads_what_torch_allocated_and_reserved(gpus: dict[str, Gpu]) -> None:
    gpus["cuda:0"].hold(300, 400)
    gpus["cuda:0"].free = 500
    reader = MemoryReader("cuda:0")
    assert reader.read() == MemoryReading(300, 400)
    assert reader.available_bytes() == 600


def test_a_meter_gives_the_largest_since_it_was_asked_also_within_a_step(gpus: dict[str, Gpu]) -> None:
    meter = MemoryMeter([FIRST])
    gpu = gpus["cuda:0"]
    gpu.hold(999, 999)  # loading takes more than what is loaded
    gpu.hold(5, 5)
    meter.loaded([7], [3])

    def peaks() -> tuple[int, int]:
        taken = meter.take()
        return taken.peak_allocated_bytes, taken.peak_reserved_bytes

    for allocated, reserved in ((10, 90), (30, 40), (20, 50)):
        gpu.hold(allocated, reserved)
    assert peaks() == (30, 90)
    assert peaks() == (20, 50), "nothing was held since: the latest counts"
    gpu.hold(5, 50)
    assert peaks() == (20, 50), "what was held when the interval began counts"
    assert peaks() == (5, 50)


def test_a_cpus_meter_keeps_the_largest_that_was_observed(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = MemoryMeter([DeviceInfo("cpu", None, 1000, "cpu")])
    meter.loaded([7], [3])
    for resident in (10, 30, 20):
        monkeypatch.setattr(MemoryReader, "read", lambda self, resident=resident: MemoryReading(resident, resident))
        meter.observe()
    assert [meter.take().peak_allocated_bytes for _ in range(2)] == [30, 20]


def test_every_device_has_its_numbers_and_the_sums_are_theirs(gpus: dict[str, Gpu]) -> None:
    gpus["cuda:0"].free, gpus["cuda:1"].free = 900, 1_500
    meter = MemoryMeter([FIRST, SECOND])
    meter.loaded([100, 200], [10, 20])
    gpus["cuda:0"].hold(150, 160)
    gpus["cuda:1"].hold(250, 260)
    gpus["cuda:0"].free = 400
    assert meter.take() == Memory(
        300, 400, 420, 3000,
        (
            DeviceMemory("cuda:2", "GPU", "GPU-1", 100, 10, 150, 160, 900, 600, 1000),
            DeviceMemory("cuda:3", "GPU", "GPU-2", 200, 20, 250, 260, 1_500, 500, 2000),
        ),
    )  # fmt: skip


def test_nvml_says_what_all_processes_hold_and_the_energy_since(gpus: dict[str, Gpu], clock: Clock) -> None:
    driver = Pynvml()
    meter = MemoryMeter([FIRST, SECOND], nvml=Nvml(driver))
    first = meter.take()
    assert [each.device_used_bytes for each in first.devices] == [700, 900]
    assert first.energy_joules == 0.0, "what was taken before is no run's"
    driver.millijoules = {"GPU-1": 7_500, "GPU-2": 9_000}
    driver.used["GPU-1"] = 800
    clock.seconds += 1.1
    second = meter.take()
    assert second.energy_joules == pytest.approx(3.5)
    assert [each.device_used_bytes for each in second.devices] == [800, 900]
    clock.seconds += 1.1
    assert meter.take().energy_joules == 0.0


def test_the_driver_is_asked_about_once_a_second(gpus: dict[str, Gpu], clock: Clock) -> None:
    driver = Pynvml()
    meter = MemoryMeter([FIRST], nvml=Nvml(driver))
    for _ in range(100):
        meter.observe()
        meter.take()
        clock.seconds += 0.02
    assert driver.questions == 2


def test_a_gpu_that_counts_no_energy_has_none(gpus: dict[str, Gpu], clock: Clock) -> None:
    driver = Pynvml()
    driver.millijoules = {}
    meter = MemoryMeter([FIRST], nvml=Nvml(driver))
    taken = meter.take()
    assert (taken.energy_joules, taken.devices[0].device_used_bytes) == (None, 700)


def test_where_nvml_does_not_answer_torch_says_what_is_in_use(gpus: dict[str, Gpu], clock: Clock) -> None:
    gpus["cuda:0"].free = 450
    driver = Pynvml()
    driver.used = {}
    (device,) = MemoryMeter([FIRST], nvml=Nvml(driver)).take().devices
    assert device.device_used_bytes == 550


def test_without_a_driver_nvml_is_left_out() -> None:
    pynvml = pytest.importorskip("pynvml")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        assert Nvml.open() is None
    else:
        assert Nvml.open() is not None


def test_without_the_library_nvml_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pynvml", None)
    assert Nvml.open() is None
