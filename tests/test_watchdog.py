"""The watchdog ends a process that makes no progress, and no other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run(code: str) -> subprocess.CompletedProcess[str]:
    """Runs code that has a watchdog."""
    begin = "import time; from worker.watchdog import Watchdog; dog = Watchdog()\n"
    return subprocess.run([sys.executable, "-c", begin + code], capture_output=True, text=True, cwd=ROOT, timeout=60)


def test_a_hang_ends_the_process_and_shows_where_it_hung() -> None:
    done = run("def stuck():\n    time.sleep(50)\nwith dog.watching(0.2):\n    stuck()")
    assert done.returncode == 1
    assert "in stuck" in done.stderr


def test_a_call_that_holds_the_interpreter_is_ended_too() -> None:
    done = run("import re\nwith dog.watching(0.2):\n    re.match('(a*)*b', 'a' * 40)")
    assert done.returncode == 1


def test_progress_keeps_it_alive() -> None:
    done = run("with dog.watching(1.0):\n    for _ in range(15):\n        time.sleep(0.1); dog.rearm()\nprint('done')")
    assert done.stdout == "done\n"


def test_outside_of_watching_nothing_is_armed() -> None:
    done = run("with dog.watching(0.2):\n    pass\ndog.rearm(); time.sleep(0.5); print('done')")
    assert done.stdout == "done\n"
