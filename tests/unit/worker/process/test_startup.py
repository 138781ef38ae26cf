"""The start of a child: the order that it gives to the engine's kind."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from batchmill.jobs.configuration.settings import load_settings
from batchmill.jobs.store.store import Store
from batchmill.worker.devices.memory import MemoryMeter
from batchmill.worker.devices.placement import Placement
from batchmill.worker.devices.selection import describe_devices
from batchmill.worker.process.drain import DRAIN_SIGNAL, DrainSwitch
from batchmill.worker.process.order import ChildOrder
from batchmill.worker.process.pulse import Pulse
from batchmill.worker.process.startup import _opening, _Start
from tests.support.store import mill


@pytest.fixture
def switch() -> Iterator[DrainSwitch]:
    before = signal.getsignal(DRAIN_SIGNAL)
    yield DrainSwitch()
    signal.signal(DRAIN_SIGNAL, before)


def test_a_child_that_hashes_files_beats(sqlite_url: str, switch: DrainSwitch, tmp_path: Path) -> None:
    pulse, placement = Pulse.create(), Placement(("cpu",))
    order = ChildOrder(1, mill.ECHO_SPEC.canonical, placement.to_json(), None, False, None, pulse.path, "", 1)
    devices = describe_devices(placement.devices)
    with closing(Store(sqlite_url)) as store:
        start = _Start(order, 1, load_settings(), store, switch, pulse)
        opening = _opening(start, placement, devices, MemoryMeter(devices))
    (tmp_path / "weights").touch()
    before = pulse.read().progress
    opening.digests.of(tmp_path, ["weights"])
    assert pulse.read().progress > before
