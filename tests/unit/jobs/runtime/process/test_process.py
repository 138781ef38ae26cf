"""Identity and life of a process: a pid that the system reused is another process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from batchmill.jobs.runtime.process import process
from batchmill.jobs.runtime.process.process import Lives, Process, end_of
from tests.support.paths import ROOT

TELL = "from batchmill.jobs.runtime.process.process import Process; print(Process.own(), flush=True); input()"
#: A process in pid and mount namespaces of its own, as a container has them.
CONTAINED = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")


@pytest.fixture
def other() -> Iterator[subprocess.Popen[bytes]]:
    started = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield started
    started.kill()
    started.communicate()


def of(pid: int) -> Process:
    found = Process.of(pid)
    assert found is not None
    return found


def test_a_process_lives_until_it_has_ended(other: subprocess.Popen[bytes]) -> None:
    named = of(other.pid)
    assert (named.lives(), of(os.getpid()).lives()) == (Lives.YES, Lives.YES)
    other.kill()
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
    assert named.lives() is Lives.NO  # nobody has asked how it ended yet
    other.wait()
    assert named.lives() is Lives.NO
    assert Process.of(other.pid) is None


def test_of_a_process_that_proc_hides_nothing_is_concluded(
    other: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mount of /proc with hidepid does not show the processes of other users."""
    named = of(other.pid)
    monkeypatch.setattr(process, "_seen", lambda _pid: None)
    assert named.lives() is Lives.UNKNOWN
    other.kill()
    other.wait()
    assert named.lives() is Lives.NO


def test_another_process_of_the_same_pid_is_another(other: subprocess.Popen[bytes]) -> None:
    named = of(other.pid)
    assert replace(named, start_ticks=named.start_ticks - 1).lives() is Lives.NO
    before = replace(named, boot_id="00000000-0000-0000-0000-000000000000")
    assert (before.lives(), before.is_of_this_boot) == (Lives.NO, False)
    assert replace(named, namespace=1).lives() is Lives.UNKNOWN
    assert named.is_of_this_boot


@pytest.mark.parametrize(
    ("exit_code", "end"), [(0, "exit code 0"), (137, "exit code 137"), (-9, "SIGKILL"), (-40, "signal 40")]
)
def test_an_end_is_told_by_its_signal_or_its_exit_code(exit_code: int, end: str) -> None:
    assert end_of(exit_code) == end


def test_it_starts_when_the_kernel_says_whatever_the_clock_says(other: subprocess.Popen[bytes]) -> None:
    seconds = of(other.pid).start_ticks / os.sysconf("SC_CLK_TCK")
    assert 0 <= time.clock_gettime(time.CLOCK_BOOTTIME) - seconds < 600


def test_it_is_read_as_it_was_written(other: subprocess.Popen[bytes]) -> None:
    named = of(other.pid)
    assert Process.parse(f"{named}\n") == named
    version, *fields = str(named).split(".")
    assert version == "1"
    for newer in ("2", "10", ""):
        assert Process.parse(".".join((newer, *fields))) is None


@pytest.mark.parametrize(
    "text",
    [None, "", "4242", "2.4242.1.8c1cca16-1be0-4111-9a83-7ebe7af7b075.4026531836.new", "1.0.1." + 36 * "a" + ".1", "é"],
)
def test_of_anything_else_nothing_is_known(text: str | None) -> None:
    assert Process.parse(text) is None


def test_of_a_process_in_another_container_nothing_is_concluded() -> None:
    words = [*CONTAINED, sys.executable, "-c", TELL]
    contained = subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert contained.stdout is not None
    named = Process.parse(contained.stdout.readline())
    contained.kill()
    contained.communicate()
    if named is None:
        pytest.skip("this user may make no namespaces")
    assert named.pid == 1
    assert named.lives() is Lives.UNKNOWN  # also now that it has ended


def test_where_proc_shows_other_pids_a_process_does_not_know_itself() -> None:
    words = ["unshare", "--pid", "--fork", sys.executable, "-c", TELL]
    done = subprocess.run(words, cwd=ROOT, input="\n", capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip("this user may make no namespaces")
    assert done.stdout == "None\n"


def test_elsewhere_than_on_linux_nothing_is_known(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, other: subprocess.Popen[bytes]
) -> None:
    named = of(other.pid)
    monkeypatch.setattr(process, "_PROC", tmp_path)
    assert (Process.own(), Process.of(other.pid)) == (None, None)
    assert (named.lives(), named.is_of_this_boot) == (Lives.UNKNOWN, False)
