"""A machine of the tests with a cache of its own, on which the real client runs in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support.paths import ROOT
from tests.support.servers.hub_server import TOKEN

MODEL = "some-org/some-model"


class Machine:
    """A machine with a cache of its own, and a Hub at an address."""

    def __init__(self, home: Path, url: str) -> None:
        self.home = home
        self.url = url
        self.cache = home / "hf" / "hub"

    def environment(self, **variables: str) -> dict[str, str]:
        kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
        own = {"HOME": self.home, "HF_HOME": self.home / "hf", "BATCHMILL_HOME": self.home / "mill"}
        return kept | {name: str(value) for name, value in own.items()} | {"HF_ENDPOINT": self.url} | variables

    def run(self, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *words],
            env=self.environment(**variables),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def models(self, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return self.run("-m", "batchmill.worker", "models", *words, **variables)

    def pull(self, *words: str, **variables: str) -> dict[str, Any]:
        """A pull that succeeds, as JSON."""
        done = self.models("pull", MODEL, "--json", *words, **variables)
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def refusal(self, *words: str, **variables: str) -> str:
        """The one line of a pull that fails."""
        done = self.models("pull", *(words or (MODEL,)), **variables)
        assert done.returncode == 1, done
        assert done.stdout == ""
        assert TOKEN not in done.stderr
        *before, line = done.stderr.splitlines()
        assert not before, done.stderr
        assert line.startswith("batchmill: cannot fetch")
        return line


def found(machine: Machine, *, revision: str | None = None, what: str = "model", **variables: str) -> str:
    """The folder that a worker finds, or why not: a line. In the room of the loader, without its torch."""
    code = (
        "from batchmill.jobs.errors import ModelError\n"
        f"from batchmill.worker.models.hub.repository import find_{what} as find\n"
        "try:\n"
        f"    print(find({MODEL!r}, {revision!r}, announce=lambda files, bytes_: None).folder)\n"
        "except ModelError as error:\n"
        "    print(error)\n"
    )
    done = machine.run("-c", code, **variables)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert TOKEN not in done.stdout
    return done.stdout.strip()
