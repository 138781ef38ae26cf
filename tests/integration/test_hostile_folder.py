"""Whole commands in a folder full of hostile names, and under the variables of other projects: none of it runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from batchmill.jobs.configuration.settings import environment_of, load_settings
from tests.integration.conftest import TIMERS, until
from tests.support.processes.hostile import HostileFolder, is_installed, loaded_before_the_first_line

pytestmark = pytest.mark.skipif(not is_installed(), reason="this checkout is not installed: run `make`")
#: Celery's own, each of which would lead to a dead host, to foreign code or to a worker that does not work.
OF_CELERY = {
    "CELERY_BROKER_URL": "redis://192.0.2.1:1/0",
    "CELERY_BROKER_READ_URL": "redis://192.0.2.1:1/0",
    "CELERY_BROKER_WRITE_URL": "redis://192.0.2.1:1/0",
    "CELERY_RESULT_BACKEND": "redis://192.0.2.1:1/0",
    "CELERY_LOADER": "mysite.loaders:Loader",
    "CELERY_CONFIG_MODULE": "mysite.celeryconfig",
    "CELERY_CUSTOM_WORKER_POOL": "mysite.pool:Pool",
    "CELERY_LOG_FILE": "/nowhere/celery.log",
    "CELERY_TRACE_APP": "1",
    "C_STRICT_APP": "1",
    "PICKLE_PROTOCOL": "none",
    "REMAP_SIGTERM": "SIGQUIT",
    "_MP_FORK_LOGLEVEL_": "loud",
}
OF_DJANGO = {"DJANGO_SETTINGS_MODULE": "mysite.settings", "DJANGO_PROJECT_DIR": "."}
#: The current folder comes in by none of these.
NO_PATH = {"unset": None, "empty": ""}
#: It comes in by each of these, until a command's first line.
RELATIVE_PATHS = [":", ".", "relative"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> HostileFolder:
    return HostileFolder(tmp_path_factory.mktemp("full"))


@pytest.fixture(scope="module")
def reachable(tmp_path_factory: pytest.TempPathFactory) -> HostileFolder:
    """A folder without what runs before the first line of a command in it."""
    return HostileFolder(tmp_path_factory.mktemp("reachable"), without=loaded_before_the_first_line())


def environment(home: Path, python_path: str | None = None, **more: str) -> dict[str, str]:
    """Of a command, of whose path nothing but what a test says is set."""
    environ = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    path = {} if python_path is None else {"PYTHONPATH": python_path}
    return environ | environment_of(load_settings(home=home, **TIMERS)) | path | more


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "20 + 30 ="}\n{"prompt": "1 + 1 ="}\n')
    return path


def answers(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [json.loads(line)["text"] for line in done.stdout.splitlines()]


@pytest.mark.parametrize("python_path", NO_PATH.values(), ids=NO_PATH)
def test_an_echo_job_and_the_doctor_run_nothing_of_the_folder(
    folder: HostileFolder, prompts: Path, tmp_path: Path, python_path: str | None
) -> None:
    environ = environment(tmp_path / "home", python_path, **OF_DJANGO)
    assert answers(folder.command("run", prompts, "-m", "echo", environ=environ)) == ["20 + 30 =", "1 + 1 ="]
    assert "torch" in folder.command("doctor", environ=environ).stdout


@pytest.mark.parametrize("python_path", RELATIVE_PATHS)
def test_a_relative_path_ends_with_the_first_line(
    reachable: HostileFolder, prompts: Path, tmp_path: Path, python_path: str
) -> None:
    environ = environment(tmp_path / "home", python_path)
    assert answers(reachable.command("run", prompts, "-m", "echo", environ=environ)) == ["20 + 30 =", "1 + 1 ="]
    reachable.command("doctor", environ=environ)
    assert not {"jobs", "worker", "torch", "json"} & loaded_before_the_first_line(), "they must be in the folder"


def test_the_module_runs_nothing_of_the_folder_either(reachable: HostileFolder, prompts: Path, tmp_path: Path) -> None:
    environ = environment(tmp_path / "home")
    assert answers(reachable.module("run", prompts, "-m", "echo", environ=environ)) == ["20 + 30 =", "1 + 1 ="]


HEAVY = [
    pytest.param("full", None, id="unset"),
    pytest.param("full", "", id="empty", marks=pytest.mark.slow),
    pytest.param("reachable", ":", id="relative", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("kind", "python_path"), HEAVY)
def test_a_demo_job_and_the_commands_that_load_torch_run_nothing_of_the_folder(
    request: pytest.FixtureRequest, prompts: Path, tmp_path: Path, kind: str, python_path: str | None
) -> None:
    folder = request.getfixturevalue("folder" if kind == "full" else "reachable")
    environ = environment(tmp_path / "home", python_path)
    model = ["-q", "nf4", "--device", "cpu"]
    done = folder.command("run", prompts, "-m", "demo", *model, "--temperature", "0", environ=environ)
    assert answers(done)[0].split()[0] == "50"
    folder.command("plan", "demo", environ=environ)
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "20 + 30 =", "answer": "50"}\n')
    folder.command("evaluate", "demo", *model, "--data", data, "--max-tokens", "4", environ=environ)
    folder.command("models", "quantize", "demo", tmp_path / "copy", *model, environ=environ)
    assert (tmp_path / "copy" / "config.json").exists()


@pytest.fixture
def mill_is_up(folder: HostileFolder, tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of commands beside `up`."""
    environ = environment(tmp_path / "home")
    up = folder.start("up", "-m", "echo", environ=environ)
    until(lambda: (tmp_path / "home" / "redis.sock").exists() or up.poll() is not None, "Redis is up")
    yield environ
    up.send_signal(signal.SIGTERM)
    said = up.communicate(timeout=60)[1]
    assert up.returncode == 0, said
    assert folder.ran() == []


def test_a_mill_that_is_up_runs_nothing_of_the_folder(
    folder: HostileFolder, prompts: Path, mill_is_up: dict[str, str]
) -> None:
    folder.command("submit", prompts, "-m", "echo", "--wait", environ=mill_is_up)
    assert answers(folder.command("results", "last", environ=mill_is_up)) == ["20 + 30 =", "1 + 1 ="]
    for words in (["status"], ["jobs"], ["workers"], ["doctor", "last"], ["db", "current"]):
        folder.command(*words, environ=mill_is_up)
    folder.command("worker", "-m", "echo", "--exit-when-idle", "0.5", environ=mill_is_up)


def test_celerys_own_variables_lead_a_run_nowhere(folder: HostileFolder, prompts: Path, tmp_path: Path) -> None:
    done = folder.command("run", prompts, "-m", "echo", environ=environment(tmp_path / "home", **OF_CELERY))
    assert answers(done) == ["20 + 30 =", "1 + 1 ="]
