"""The order of a parent to its child: written by name, and read or refused in words where another one wrote it."""

from __future__ import annotations

import json
import os

import pytest

from batchmill.worker.devices.placement import Placement
from batchmill.worker.process.order import ORDER_VARIABLE, ChildOrder, ForeignOrder

ORDER = ChildOrder(
    7,
    "echo?quantization=none",
    Placement(("cpu",)).to_json(),
    None,
    share_device=True,
    adapters=None,
    pulse="/proc/1/fd/3",
    log_file="/home/logs/a.log",
    parent_pid=12,
)
#: As batchmill wrote it before an order said its form.
FORM_1 = (
    '[7, "echo?quantization=none", "{\\"devices\\": [\\"cpu\\"], \\"max_memory\\": [], \\"device_map\\": [], '
    '\\"device_map_file\\": null, \\"offload\\": null, \\"offload_folder\\": null}", null, true, null, "/proc/1/fd/3", '
    '"/home/logs/a.log", 12]'
)
#: As commit 480f1b7 wrote it, whose parent beat no pulse and kept no log file.
OLDEST = (
    '[7, "echo?quantization=none", "{\\"devices\\": [\\"cpu\\"], \\"max_memory\\": [], \\"device_map\\": [], '
    '\\"device_map_file\\": null, \\"offload\\": null, \\"offload_folder\\": null}", null, true, null]'
)


def read(monkeypatch: pytest.MonkeyPatch, written: str) -> ChildOrder:
    monkeypatch.setenv(ORDER_VARIABLE, written)
    return ChildOrder.from_environment()


def refused(monkeypatch: pytest.MonkeyPatch, written: str) -> ForeignOrder:
    with pytest.raises(ForeignOrder, match=r"installed anew while this worker ran.*start the worker again") as caught:
        read(monkeypatch, written)
    return caught.value


def test_an_order_survives_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read(monkeypatch, ORDER.to_environment()) == ORDER


def test_an_order_is_written_by_name_and_says_its_form() -> None:
    written = json.loads(ORDER.to_environment())
    assert (written["form"], written["worker_id"], written["log_file"]) == (2, 7, "/home/logs/a.log")


def test_an_order_of_before_it_said_its_form_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read(monkeypatch, FORM_1) == ORDER


def test_an_order_that_lacks_what_is_needed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    refusal = refused(monkeypatch, OLDEST)
    assert (refusal.worker_id, refusal.parent_pid) == (7, os.getppid())


@pytest.mark.parametrize("newer", [{"form": 3}, {"room": "upstairs"}])
def test_an_order_of_a_newer_batchmill_is_refused(monkeypatch: pytest.MonkeyPatch, newer: dict[str, object]) -> None:
    refusal = refused(monkeypatch, json.dumps(json.loads(ORDER.to_environment()) | newer))
    assert (refusal.worker_id, refusal.parent_pid) == (7, 12)
