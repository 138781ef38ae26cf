"""The batchmill command in a process of its own, on the store of a test."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from batchmill.jobs.store.store import Store
from tests.support.paths import ROOT


def command(store: Store, *words: str | Path, **more: Any) -> subprocess.CompletedProcess[str]:
    environ = os.environ | {"BATCHMILL_DATABASE_URL": str(store.database.url), "PYTHONPATH": str(ROOT / "src")}
    environ |= more.pop("env", {})
    line = [*more.pop("through", []), sys.executable, "-m", "batchmill", *map(str, words)]
    return subprocess.run(line, text=True, env=environ, timeout=60, stderr=subprocess.PIPE, **more)
