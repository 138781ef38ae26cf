"""The wheel of this checkout, and environments of its own that it is installed into."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.support.paths import ROOT

#: Part of pip's message where no registry can be reached.
UNREACHABLE = "connection broken by"


def copy_sources(to: Path) -> Path:
    """The files of a checkout that a wheel is built from: building leaves files beside them."""
    ignore = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "tests")
    return Path(shutil.copytree(ROOT, to, symlinks=True, ignore=ignore))


def build_wheel(source: Path, out: Path) -> Path:
    line = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out)]
    done = subprocess.run([*line, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = out.glob("*.whl")
    return wheel


class Installation:
    """An empty environment, into which the wheel was installed with these extras, pinned as `make` pins."""

    def __init__(self, folder: Path, wheel: Path, extras: str = "") -> None:
        self.folder = folder
        self._bin = folder / "venv" / "bin"
        venv.create(folder / "venv", with_pip=True)
        what = f"{wheel}[{extras}]" if extras else str(wheel)
        done = self.run("pip", "install", "--retries=1", f"--constraint={ROOT / 'constraints.txt'}", what)
        if done.returncode and UNREACHABLE in done.stderr and not os.environ.get("CI"):
            pytest.skip("no package registry can be reached")
        assert done.returncode == 0, done.stderr

    def run(self, name: str, *words: str | Path, path: str = "", **more: str) -> subprocess.CompletedProcess[str]:
        """Runs a script of the environment, in an empty folder and with nothing of this process's own settings."""
        kept = {key: value for key, value in os.environ.items() if key.startswith(("PIP_", "LANG", "LC_", "OMP_"))}
        path = os.pathsep.join(filter(None, [path, "/usr/bin", "/bin"]))
        environ = kept | {"PATH": path, "HOME": str(self.folder), "BATCHMILL_HOME": str(self.folder / "home")} | more
        empty = self.folder / "empty"
        empty.mkdir(exist_ok=True)
        line = [str(self._bin / name), *map(str, words)]
        return subprocess.run(line, cwd=empty, env=environ, capture_output=True, text=True, timeout=1_200)

    def batchmill(self, *words: str | Path, path: str = "", **more: str) -> str:
        """Runs a command that has to succeed, and returns its stdout."""
        done = self.run("batchmill", *words, path=path, **more)
        assert done.returncode == 0, f"{words}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout
