"""deploy/batchmill-worker@.service, and systemd's own check of it where that is installed."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from batchmill.jobs.configuration.settings import PREFIX
from tests.support.deploy import UNIT, assignments, unit


def test_the_unit_serves_the_gpu_of_its_instance() -> None:
    keys = unit()
    (start,) = keys["ExecStart"]
    words = start.split()
    assert words[words.index("--device") + 1] == "cuda:%i"
    assert "%i" in words[words.index("--name") + 1]
    assert "CUDA_DEVICE_ORDER=PCI_BUS_ID" in " ".join(keys["Environment"]).split()


def test_the_unit_signals_the_worker_alone_and_starts_it_again_ever_more_slowly() -> None:
    keys = unit()
    expected = {
        "KillMode": "mixed",
        "KillSignal": "SIGTERM",
        "OOMPolicy": "continue",
        "Restart": "on-failure",
        "RestartPreventExitStatus": "2",
        "StartLimitIntervalSec": "0",
    }
    assert {key: keys[key] for key in expected} == {key: [value] for key, value in expected.items()}
    assert {"RestartSec", "RestartSteps", "RestartMaxDelaySec"} <= set(keys)


def test_the_unit_is_hardened_and_leaves_cuda_what_it_needs() -> None:
    keys = unit()
    for key, value in {"NoNewPrivileges": "true", "ProtectSystem": "strict", "PrivateTmp": "true"}.items():
        assert keys[key] == [value]
    assert keys["User"] != ["root"]
    closes_devices = {"PrivateDevices", "ProtectClock", "DevicePolicy", "DeviceAllow"}
    assert not (closes_devices | {"MemoryDenyWriteExecute", "ProcSubset"}) & set(keys)


def test_the_unit_writes_only_where_it_may() -> None:
    keys = unit()
    (state,) = keys["StateDirectory"]
    environment = dict(word.split("=", 1) for word in " ".join(keys["Environment"]).split())
    for folder in (*keys["WorkingDirectory"], environment["HOME"], environment["HF_HOME"]):
        assert Path(folder).is_relative_to(Path("/var/lib") / state)


def test_the_unit_finds_every_variable_of_its_command_in_its_environment_file() -> None:
    (start,) = unit()["ExecStart"]
    variables = set(re.findall(r"\$\{?(\w+)", start))
    assert variables <= set(assignments("worker.env.example"))
    assert not any(name.startswith(PREFIX) for name in variables), "those are settings, and unknown ones are refused"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    version = int(subprocess.check_output(["systemd-analyze", "--version"], text=True).split()[1].split(".")[0])
    # Programs that are not installed here would be complained about.
    text = re.sub(r"/(?:opt|usr)/\S*/(?:batchmill|nvidia-modprobe)", shutil.which("true") or "", UNIT.read_text())
    (tmp_path / UNIT.name).write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(tmp_path / UNIT.name)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    since_254 = r"Unknown key (?:name )?'(?:RestartSteps|RestartMaxDelaySec)'"
    complaints = [line for line in done.stderr.splitlines() if "batchmill-worker@" in line]
    assert [line for line in complaints if version >= 254 or not re.search(since_254, line)] == []
