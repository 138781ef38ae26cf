"""The variables and import paths that a command removes before it imports anything."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import SupportsIndex

import click
import pytest

from batchmill.jobs.broker.client import Loader, make_app
from batchmill.jobs.runtime.process.isolation import is_foreign, isolate
from tests.support.paths import ROOT

LIBRARIES = Path(click.__file__).parent.parent
URL = "redis://mill.invalid:6379/0"
#: Reads of a variable in Celery, kombu and billiard, where its name is written out.
READ = re.compile(r"""environ(?:\.get|\.pop|\.setdefault)?[(\[]\s*['"](\w+)['"]|getenv\(\s*['"](\w+)['"]""")
#: Parts that batchmill's processes never import: Celery's own command line, and ways to other brokers.
NOT_USED = re.compile(r"celery/(bin|contrib)/|kombu/transport/(?!base|virtual|redis|__init__)")
#: Variables that other programs read too, or that are only written.
HARMLESS = {"TERM", "ITERM_PROFILE", "NUMBER_OF_PROCESSORS", "celery_dummy_proxy"}


@pytest.fixture(autouse=True)
def environment_comes_back() -> Iterator[None]:
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def test_every_variable_that_celery_reads_is_taken_away() -> None:
    found: dict[str, str] = {}
    for package in ("celery", "kombu", "billiard", "vine", "amqp"):
        for path in (LIBRARIES / package).rglob("*.py"):
            if not NOT_USED.search(path.as_posix()):
                names = {name for pair in READ.findall(path.read_text()) for name in pair if name}
                found |= dict.fromkeys(names, str(path))
    assert {"CELERY_BROKER_URL", "DJANGO_SETTINGS_MODULE", "PICKLE_PROTOCOL"} <= set(found), "the pattern finds some"
    left = {name: path for name, path in found.items() if not is_foreign(name) and name not in HARMLESS}
    assert not left, f"add them to jobs/runtime/process/isolation.py: {left}"


@pytest.mark.parametrize("name", ["BATCHMILL_BROKER_URL", "C_INCLUDE_PATH", "HF_TOKEN", "CUDA_VISIBLE_DEVICES"])
def test_what_the_user_says_to_others_stays(name: str) -> None:
    assert not is_foreign(name)


def test_celerys_variables_change_no_url(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CELERY_BROKER_URL", "CELERY_BROKER_READ_URL", "CELERY_BROKER_WRITE_URL", "CELERY_RESULT_BACKEND"):
        monkeypatch.setenv(name, "redis://elsewhere.invalid/1")
    monkeypatch.setenv("CELERY_LOADER", "nowhere:Loader")
    isolate()
    conf = make_app(URL).conf
    assert (conf.broker_url, conf.broker_read_url, conf.broker_write_url) == (URL, URL, URL)
    assert conf.result_backend is None


def test_the_app_imports_plainly_and_nothing_of_django(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "module_of_the_folder.py").write_text("raise AssertionError")
    (tmp_path / "mysite.py").write_text("raise AssertionError")
    monkeypatch.setenv("DJANGO_SETTINGS_MODULE", "mysite.settings")
    app = make_app(URL)
    assert type(app.loader) is Loader
    with pytest.raises(ModuleNotFoundError):
        app.loader.import_task_module("module_of_the_folder")


class WatchedPath(list[str]):
    """Import paths that refuse another in front."""

    def insert(self, place: SupportsIndex, entry: str, /) -> None:
        pytest.fail(f"{entry} was put in front of the import paths")


def test_the_loader_is_not_looked_up_in_the_current_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "path", WatchedPath(each for each in sys.path if each != str(tmp_path)))
    assert type(make_app(URL).loader) is Loader


@pytest.mark.parametrize(
    ("written", "left"),
    [
        ("/opt/mine", "/opt/mine"),
        (":/opt/mine::relative:./here:/opt/other:", "/opt/mine:/opt/other"),
        (":", ""),
        ("", ""),
    ],
)
@pytest.mark.parametrize("name", ["PYTHONPATH", "PATH", "LD_LIBRARY_PATH"])
def test_lists_of_folders_keep_what_is_absolute(
    name: str, written: str, left: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, written)
    isolate()
    assert os.environ[name] == left
    assert os.environ["PYTHONSAFEPATH"] == "1"


SHOW = f"""\
import os, runpy, sys
runpy.run_path({str(ROOT / "src" / "batchmill" / "__main__.py")!r})['_leave_current_folder']()
print(os.getcwd() in sys.path, os.path.abspath('relative') in sys.path, '' in sys.path, '/opt/mine' in sys.path)
import click, json, tomllib
"""


@pytest.mark.parametrize("python_path", [None, "", ":", ".", "relative", "/opt/mine:", "/opt/mine:relative::."])
def test_the_current_folder_leaves_the_path_and_what_is_named_stays(tmp_path: Path, python_path: str | None) -> None:
    (tmp_path / "relative").mkdir()
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environ |= {} if python_path is None else {"PYTHONPATH": python_path}
    said = subprocess.run([sys.executable, "-c", SHOW], cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert said.stdout.split() == ["False", "False", "False", str("/opt/mine" in (python_path or ""))], said.stderr


def test_the_current_folder_stays_where_it_is_named_or_holds_python_or_batchmill(tmp_path: Path) -> None:
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    named, kept = (tmp_path, f".:{tmp_path}"), (ROOT / "src", LIBRARIES, Path(os.__file__).parent)
    for folder, path in (named, *((each, ":") for each in kept)):
        line = [sys.executable, "-c", SHOW]
        said = subprocess.run(line, cwd=folder, env=environ | {"PYTHONPATH": path}, capture_output=True, text=True)
        assert said.returncode == 0, said.stderr
        assert said.stdout.split()[0] == "True"


NEVER_INSTALLED = """\
import os, sys
from batchmill.__main__ import _leave_current_folder
_leave_current_folder()
from batchmill.jobs.runtime.process.isolation import isolate
isolate()
os.execv(sys.executable, [sys.executable, '-S', '-P', '-m', 'batchmill.worker', 'plan', '--help'])
"""


def test_a_checkout_that_was_never_installed_starts_its_workers(tmp_path: Path) -> None:
    (tmp_path / "batchmill").symlink_to(ROOT / "src" / "batchmill")
    # -S: the libraries come by name, and no editable installation does.
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": f":{LIBRARIES}"}
    line = [sys.executable, "-S", "-c", NEVER_INSTALLED]
    done = subprocess.run(line, cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Usage:" in done.stdout


def test_what_a_tracker_tidies_up_is_no_warning_and_the_users_own_filters_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONWARNINGS", "error::UserWarning,ignore::ResourceWarning")
    isolate()
    written = os.environ["PYTHONWARNINGS"]
    isolate()
    assert os.environ["PYTHONWARNINGS"] == written
    assert written.startswith("error::UserWarning,ignore::ResourceWarning,")
    warned = "import warnings; warnings.warn('{}: There appear to be 1 leaked semaphores to clean up at shutdown')"
    for tracker, code in (("semaphore_tracker", 0), ("resource_tracker", 0), ("another", 1)):
        assert subprocess.run([sys.executable, "-c", warned.format(tracker)], capture_output=True).returncode == code
