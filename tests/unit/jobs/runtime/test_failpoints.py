"""Failpoints: free when unset, fired once in a home, refused when misspelt, and each used in the code."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from batchmill.jobs.errors import SettingsError
from batchmill.jobs.runtime import failpoints
from batchmill.jobs.runtime.failpoints import POINTS, arm, failpoint
from tests.support.paths import ROOT


@pytest.fixture(autouse=True)
def disarm(tmp_path: Path) -> Iterator[None]:
    yield
    arm("", home=tmp_path)


def test_unset_it_does_nothing(tmp_path: Path) -> None:
    arm("", home=tmp_path)
    failpoint("turn.saved")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("written", ["turn.saved", "turn.saved=kill9", "no.such=kill9@1", "turn.saved=shout@1", "x"])
def test_a_misspelt_one_is_refused(tmp_path: Path, written: str) -> None:
    with pytest.raises(SettingsError, match="BATCHMILL_FAILPOINT"):
        arm(written, home=tmp_path)


def test_it_fires_at_the_nth_hit_and_once_in_a_home(tmp_path: Path) -> None:
    for expected in ([False, True, False], [False, False, False]):
        arm("turn.saved=full@2", home=tmp_path)
        for fires in expected:
            failpoint("turn.claimed")
            with pytest.raises(OSError, match="No space left") if fires else nullcontext():
                failpoint("turn.saved")


def test_passings_can_be_noted(tmp_path: Path) -> None:
    arm("turn.saved=note@1", home=tmp_path)
    for _ in range(3):
        failpoint("turn.saved")
    assert len((tmp_path / "failpoint.turn.saved").read_text().splitlines()) == 3


def test_kill9_is_what_it_says(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from batchmill.jobs.runtime.failpoints import *;"
        "arm('turn.saved=kill9@1', home=pathlib.Path(sys.argv[1]))"
    )
    code += "; failpoint('turn.saved')"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL


def test_every_point_stands_in_the_code_and_no_other() -> None:
    sources = [path for room in ("jobs", "producer", "worker") for path in (ROOT / room).rglob("*.py")]
    found = [name for path in sources for name in re.findall(r"failpoint\(\"([a-z.]+)\"\)", path.read_text())]
    assert set(found) == set(POINTS)
    assert failpoints._armed is None
