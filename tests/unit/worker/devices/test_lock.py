"""One worker per GPU: the second process is refused, and told who holds the device."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from batchmill.jobs.errors import AlreadyRunning
from batchmill.worker.devices import lock as device_lock
from batchmill.worker.devices.lock import DeviceLock, DeviceLocks
from tests.support.paths import ROOT

HOLD = """
import sys, pathlib
from batchmill.worker.devices.lock import DeviceLock
lock = DeviceLock("GPU-1", folder=pathlib.Path(sys.argv[1]))
lock.take()
print("held", flush=True)
sys.stdin.read()
"""


def test_the_second_worker_of_a_gpu_is_refused_until_the_first_process_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_lock, "_PATIENCE_SECONDS", 0.1)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(AlreadyRunning, match=f"GPU-1 .pid {holder.pid}.*--share-device"):
        DeviceLock("GPU-1", folder=tmp_path).take()
    DeviceLock("GPU-2", folder=tmp_path).take()
    holder.kill()
    holder.communicate()
    DeviceLock("GPU-1", folder=tmp_path).take()


def test_of_several_devices_all_are_held_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_lock, "_PATIENCE_SECONDS", 0.1)
    other = DeviceLock("GPU-2", folder=tmp_path)
    other.take()
    DeviceLock("MIG-GPU-2/1/0", folder=tmp_path).take()
    with pytest.raises(AlreadyRunning, match="GPU-2"):
        DeviceLocks(["GPU-3", "GPU-1", "GPU-2"], folder=tmp_path).take()
    both = DeviceLocks(["GPU-3", "GPU-1"], folder=tmp_path)
    both.take()
    with pytest.raises(AlreadyRunning, match="GPU-1"):
        DeviceLock("GPU-1", folder=tmp_path).take()


def test_two_workers_ask_for_devices_in_one_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(DeviceLock, "take", lambda self: asked.append(self._uuid))
    DeviceLocks(["GPU-2", "GPU-1"], folder=tmp_path).take()
    DeviceLocks(["GPU-1", "GPU-2"], folder=tmp_path).take()
    assert asked == ["GPU-1", "GPU-2"] * 2


def test_another_users_lock_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(device_lock.FileLock, "acquire", refuse)
    with pytest.raises(AlreadyRunning, match=r"another user's worker.*delete .*batchmill-GPU-1.lock"):
        DeviceLock("GPU-1", folder=tmp_path).take()


def test_it_lies_where_services_with_a_private_tmp_see_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_lock, "_MACHINES_FOLDER", tmp_path)
    assert device_lock._folder() == tmp_path
    monkeypatch.setattr(device_lock, "_MACHINES_FOLDER", tmp_path / "none")
    assert device_lock._folder() == Path(device_lock.tempfile.gettempdir())
