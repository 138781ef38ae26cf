"""The watchdog ends a child that makes no progress, and no other; for a pause it ends nobody."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from batchmill.worker.process.maintenance import watchdog
from batchmill.worker.process.maintenance.watchdog import Watchdog
from batchmill.worker.process.pulse import Pulse
from tests.support.paths import ROOT

BEGIN = """\
import sys, time
from batchmill.worker.process.pulse import Pulse
from batchmill.worker.process.maintenance.watchdog import tell_stacks_when_asked
pulse = Pulse.of(sys.argv[1])
tell_stacks_when_asked(pulse)
"""
#: Beats ten times a second for half a minute at most, and ends once it finds the file that it is given.
BEATS = """\
import os
with pulse.watching(1.0):
    print('beats', flush=True)
    for _ in range(300):
        time.sleep(0.1)
        pulse.beat()
        if os.path.exists(sys.argv[2]):
            break
print('done')
"""
#: A parent with a watchdog and a child in one group, as a container or a suspended machine holds them together.
PARENT = """\
import subprocess, sys
from batchmill.worker.process.pulse import Pulse
from batchmill.worker.process.maintenance.watchdog import Watchdog
pulse = Pulse.create()
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], pulse.path, sys.argv[2]])
Watchdog(pulse, pids=lambda: [child.pid]).start()
sys.exit(child.wait())
"""
#: Longer than the limit of those that are stopped.
PAUSE_SECONDS = 3.0

Started = subprocess.Popen[str]


@pytest.fixture
def start() -> Iterator[Callable[..., Started]]:
    """Starts code that has the pulse of a watchdog of this process."""
    started: list[Started] = []

    def begin(code: str, *words: str | Path) -> Started:
        pulse = Pulse.create()
        child = python(BEGIN + code, pulse.path, *words)
        started.append(child)
        Watchdog(pulse, pids=lambda: [child.pid] if child.poll() is None else []).start()
        return child

    yield begin
    for child in started:
        child.kill()
        child.wait()


def python(code: str, *words: str | Path) -> Started:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )


def test_a_hang_ends_the_process_and_shows_where_it_hung(start: Callable[..., Started]) -> None:
    with capture_logs() as logs:
        child = start("def stuck():\n    time.sleep(50)\nwith pulse.watching(0.2):\n    stuck()")
        child.communicate(timeout=120)
    assert child.returncode == -signal.SIGKILL
    assert ["in stuck" in each["stack"] for each in logs] == [True]


def test_a_call_that_holds_the_interpreter_is_ended_too(start: Callable[..., Started]) -> None:
    with capture_logs() as logs:
        child = start(
            "import re\ndef stuck():\n    re.match('(a*)*b', 'a' * 40)\nwith pulse.watching(0.2):\n    stuck()"
        )
        child.communicate(timeout=120)
    assert child.returncode == -signal.SIGKILL
    assert ["in stuck" in each["stack"] for each in logs] == [True]


def test_progress_keeps_it_alive(start: Callable[..., Started]) -> None:
    child = start(
        "with pulse.watching(2.0):\n    for _ in range(30):\n        time.sleep(0.1); pulse.beat()\nprint('done')"
    )
    assert child.communicate(timeout=120)[0] == "done\n"


def test_outside_of_watching_it_may_idle(start: Callable[..., Started]) -> None:
    child = start("with pulse.watching(0.2):\n    pass\npulse.beat(); time.sleep(2.0); print('done')")
    assert child.communicate(timeout=120)[0] == "done\n"


def test_a_process_that_was_stopped_is_not_ended(start: Callable[..., Started], tmp_path: Path) -> None:
    child = start(BEATS, tmp_path / "end")
    assert child.stdout is not None
    assert child.stdout.readline() == "beats\n"
    child.send_signal(signal.SIGSTOP)
    time.sleep(PAUSE_SECONDS)
    child.send_signal(signal.SIGCONT)
    (tmp_path / "end").touch()
    assert child.communicate(timeout=120)[0] == "done\n"


def test_a_process_that_was_paused_with_its_parent_is_not_ended(tmp_path: Path) -> None:
    """The parent wakes first, while the child looks as if it had hung all the time."""
    parent = python(PARENT, BEGIN + BEATS, tmp_path / "end")
    assert parent.stdout is not None
    assert parent.stdout.readline() == "beats\n"
    os.killpg(parent.pid, signal.SIGSTOP)
    time.sleep(PAUSE_SECONDS)
    os.killpg(parent.pid, signal.SIGCONT)
    (tmp_path / "end").touch()
    said = parent.communicate(timeout=120)
    assert (said[0], parent.returncode) == ("done\n", 0), said[1]


def test_a_look_that_comes_late_counts_no_more_than_two_ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the first one after a pause of parent and child does, which may come before the child makes progress."""
    pulse = Pulse.create()
    ended: list[int] = []
    dog = Watchdog(pulse, pids=lambda: [os.getpid()])
    monkeypatch.setattr(dog, "_end", ended.append)
    times = iter((0.0, 0.25, 1_000.0))
    monkeypatch.setattr(watchdog.time, "sleep", lambda _seconds: None)
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: next(times))
    with pulse.watching(10.0), pytest.raises(StopIteration):
        dog._run()
    monkeypatch.undo()
    assert ended == []


def test_a_pause_makes_no_hang_younger(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a hanging child that is paused now and then would never be ended."""
    pulse = Pulse.create()
    ended: list[int] = []
    dog = Watchdog(pulse, pids=lambda: [os.getpid()])
    monkeypatch.setattr(dog, "_end", ended.append)
    with pulse.watching(10.0):
        dog._look(6.0)  # it sees the beginning
        for paused in (False, True, False):
            monkeypatch.setattr(watchdog, "_is_paused", lambda _pid, paused=paused: paused)
            assert ended == []
            dog._look(6.0)
    assert ended == [os.getpid()]


def test_a_hang_is_counted_on_after_a_pause(start: Callable[..., Started]) -> None:
    child = start("print('hangs', flush=True)\nwith pulse.watching(1.0):\n    time.sleep(50)")
    assert child.stdout is not None
    assert child.stdout.readline() == "hangs\n"
    child.send_signal(signal.SIGSTOP)
    time.sleep(PAUSE_SECONDS)
    assert child.poll() is None
    child.send_signal(signal.SIGCONT)
    child.communicate(timeout=120)
    assert child.returncode == -signal.SIGKILL
