"""Memory by device: joined by the larger number, kept as JSON, and the energy shared by those who took it."""

from __future__ import annotations

from batchmill.jobs.models.device_memory import (
    DeviceMemory,
    Memory,
    devices_from_text,
    devices_text,
    largest,
    largest_of_texts,
)
from batchmill.jobs.requests.generation import GenerationRequest
from batchmill.jobs.store.leases.lease import BatchReport, Claimed, Lease, SyncResult
from batchmill.jobs.store.store import Store
from batchmill.producer.cli.text.device_lines import device_line, memory_lines
from batchmill.producer.views.public_json import status_json
from batchmill.producer.views.status import JobStatus
from batchmill.worker.loop.holdings import Holdings
from tests.support.store import mill


def gpu(number: int = 1, *, peak: int = 50, used: int = 60, weights: int = 10) -> DeviceMemory:
    return DeviceMemory(f"cuda:{number}", "NVIDIA A", f"GPU-{number}", weights, 5, peak, peak + 1, 90, used, 100)


def test_two_times_are_one_with_the_larger_bytes_of_each_device() -> None:
    before, after = (
        Memory.of([gpu(1, peak=50), gpu(2, used=70)]),
        Memory.of([gpu(1, peak=40, used=80), gpu(2, used=60)]),
    )
    joined = before.and_then(after)
    assert joined.devices == (gpu(1, peak=50, used=80), gpu(2, used=70))
    assert joined.peak_allocated_bytes == 100
    assert Memory().and_then(after) == after


def test_devices_of_the_same_name_are_told_apart_by_their_uuid() -> None:
    here, there = DeviceMemory("cuda:0", "GPU", "GPU-1"), DeviceMemory("cuda:0", "GPU", "GPU-2")
    assert largest([here, there, here]) == (here, there)


def test_of_many_texts_each_device_has_the_largest_numbers() -> None:
    said = ([gpu(1, peak=50), gpu(2)], [gpu(1, peak=70, used=40)], [DeviceMemory("cpu", "cpu")])
    texts = [text for each in said if (text := devices_text(each)) is not None]
    assert largest_of_texts(texts) == largest([device for each in said for device in each])


def test_devices_survive_the_store() -> None:
    assert devices_from_text(devices_text([gpu(1), gpu(2)])) == (gpu(1), gpu(2))
    assert devices_from_text(devices_text([])) == ()


def holding(*batches: tuple[int, int]) -> Holdings:
    """Batches by id, with so many of their two requests in flight."""
    holdings = Holdings()
    prompts = {
        number: tuple(GenerationRequest(2 * number + place, f"r{number}-{place}", prompt="x") for place in (0, 1))
        for number, _ in batches
    }
    claimed = tuple(Claimed(Lease(number, 1, number, "job"), prompts[number], begun) for number, begun in batches)
    holdings.absorb(holdings.next_request(room=0, memory=Memory(), release=False), SyncResult(claimed=claimed))
    return holdings


def joules(holdings: Holdings, taken: float | None) -> list[float | None]:
    memory = Memory.of([gpu()], energy_joules=taken)
    return [each.memory.energy_joules for each in holdings.next_request(room=0, memory=memory, release=False).reports]


def test_energy_is_shared_by_the_batches_that_are_worked_on_and_adds_up() -> None:
    holdings = holding((1, 1), (2, 2), (3, 0))
    assert joules(holdings, 6.0) == [3.0, 3.0, 0.0]
    assert joules(holdings, None) == [3.0, 3.0, 0.0]
    assert joules(holdings, 1.0) == [3.5, 3.5, 0.0]


def test_a_batch_says_the_most_since_it_was_claimed_also_what_no_commit_took() -> None:
    holdings = holding((1, 1))
    for peak in (20, 70, 30):
        said = holdings.next_request(room=0, memory=Memory.of([gpu(peak=peak)]), release=False)
    assert said.reports[0].memory.devices == (gpu(peak=70),)


def run_with(store: Store, memory: Memory, *, more: Memory | None = None) -> str:
    """A job of one batch, worked on with this memory, and then with more."""
    job_id, who = mill.load(store, 2), mill.session(store)
    (claimed,) = mill.claim(store, who)
    for each in filter(None, (memory, more)):
        mill.save(store, who, [BatchReport(claimed.lease, memory=each)])
    return job_id


def test_a_run_keeps_each_device_and_its_energy_in_the_store(store: Store) -> None:
    first = Memory.of([gpu(1), gpu(2)], energy_joules=2.0)
    job_id = run_with(store, first, more=first.and_then(Memory.of([gpu(1, peak=80)], energy_joules=1.5)))
    memory = store.usage.of(job_id).memory
    assert memory.devices == (gpu(1, peak=80), gpu(2))
    assert memory.energy_joules == 3.5
    assert memory.weights_bytes == 20


def test_what_a_crash_left_takes_nothing_back(store: Store) -> None:
    job_id = run_with(store, Memory.of([gpu()], energy_joules=2.0), more=Memory())
    assert store.usage.of(job_id).memory.devices == (gpu(),)
    assert store.usage.of(job_id).memory.energy_joules == 2.0


def test_a_job_has_the_largest_of_all_its_runs_and_the_sum_of_their_energy(store: Store) -> None:
    job_id = mill.load(store, 8, batch_size=4)
    for peak in (50, 70):
        who = mill.session(store)
        (claimed,) = mill.claim(store, who, wanted=4, room=4)
        mill.save(store, who, [BatchReport(claimed.lease, memory=Memory.of([gpu(peak=peak)], energy_joules=2.0))])
    status = status_json(JobStatus.read(store, job_id))
    assert [each["peak_allocated_bytes"] for each in status["devices"]] == [70]
    assert status["energy_joules"] == 4.0
    assert status["devices"][0]["uuid"] == "GPU-1"


def test_a_worker_says_what_its_devices_hold_now(store: Store) -> None:
    who = mill.session(store)
    store.registration.measured(who.worker_id, who.generation, devices=[gpu(used=60)])
    store.registration.measured(who.worker_id, who.generation, devices=[gpu(used=40)])
    store.registration.measured(who.worker_id, who.generation - 1, devices=[gpu(used=99)])
    (row,) = store.workers.rows()
    assert row.devices == (gpu(used=40),)


def test_lines_for_people_name_each_gpu_and_the_energy() -> None:
    lines = memory_lines(Memory.of([gpu(1), gpu(2)], energy_joules=3_600.0))
    assert [title for title, _ in lines] == ["device", "device", "energy"]
    assert lines[0][1].startswith("cuda:1 NVIDIA A: 10 B weights, 5 B cache, peak 50 B allocated, 51 B reserved;")
    assert "at most 60 B of 100 B in use, 90 B free before loading" in lines[0][1]
    assert lines[2][1].startswith("3,600 J (0.0010 kWh)")
    assert "at most" not in device_line(gpu(), now=True)


def test_a_job_on_a_cpu_needs_no_more_lines() -> None:
    assert memory_lines(Memory.of([DeviceMemory("cpu", "cpu")])) == []
