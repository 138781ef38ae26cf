"""The wheel works in an empty environment, with no extra and with each extra alone."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from zipfile import ZipFile

import pytest

from batchmill.jobs import VERSION
from batchmill.jobs.broker.embedded import find_server
from tests.support.processes.wheel import ROOT, Installation, build_wheel, copy_sources

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
#: The rooms of a machine without a device, all of whose modules have to be importable with no extra at all.
IMPORT_ALL = """\
import pkgutil
from importlib import import_module
from batchmill import jobs, migrations, producer
for room in (jobs, migrations, producer):
    for each in pkgutil.walk_packages(room.__path__, room.__name__ + '.'):
        if not each.name.startswith('batchmill.migrations.env'):
            import_module(each.name)
"""

pytestmark = [pytest.mark.xdist_group("packaging"), pytest.mark.timeout(1_500)]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    return build_wheel(copy_sources(folder / "source"), folder / "dist")


def run_echo(installation: Installation, path: str = "") -> None:
    """A whole job, by the Redis that is found on `path` or that the installation brings."""
    prompts = installation.folder / "prompts.txt"
    prompts.write_text("one\ntwo\n")
    said = installation.batchmill("run", prompts, "-m", "echo", path=path)
    assert [json.loads(line)["text"] for line in said.splitlines()] == ["one", "two"]


def check(installation: Installation, path: str) -> None:
    """Checks that hold with any extras."""
    assert installation.batchmill("--version") == f"batchmill, version {VERSION}\n"
    assert "submit" in installation.batchmill("--help")
    installation.batchmill("doctor", path=path)
    done = installation.run("python", "-c", IMPORT_ALL)
    assert done.returncode == 0, done.stderr
    done = installation.run("pip", "check")
    assert done.returncode == 0, done.stdout
    pinned = (ROOT / "constraints.txt").read_text().lower().replace("_", "-").splitlines()
    installed = installation.run("pip", "list", "--format=json").stdout
    for each in json.loads(installed):
        name, version = each["name"].lower().replace("_", "-"), re.sub(r"\+.*", "", each["version"])
        assert f"{name}=={version}" in pinned or name in ("batchmill", "pip", "setuptools"), f"{each} is not pinned"


def test_a_wheel_holds_one_package(wheel: Path) -> None:
    names = {name.split("/")[0] for name in ZipFile(wheel).namelist()}
    assert {name for name in names if not name.endswith(".dist-info")} == {"batchmill"}


@pytest.fixture
def redis_path(tmp_path: Path) -> str:
    """A folder for PATH that holds a Redis server, as a machine has where the extra `embedded` is not installed."""
    server = find_server()
    assert server is not None
    folder = tmp_path / "redis"
    folder.mkdir()
    (folder / "redis-server").symlink_to(server)
    return str(folder)


def test_without_an_extra_it_starts_and_runs_an_echo_job(wheel: Path, tmp_path: Path, redis_path: str) -> None:
    installation = Installation(tmp_path, wheel)
    check(installation, redis_path)
    run_echo(installation, redis_path)
    done = installation.run("batchmill", "jobs", BATCHMILL_DATABASE_URL="postgresql://mill:secret@localhost/mill")
    assert (done.returncode, done.stdout) == (2, "")
    lacks = "needs psycopg, which is not installed: `pip install 'batchmill[postgres]'`"
    assert done.stderr == f"batchmill: the store postgresql://mill:***@localhost/mill {lacks}\n"


def test_with_postgres_it_speaks_to_postgresql(
    wheel: Path, tmp_path: Path, redis_path: str, postgresql_url: str
) -> None:
    installation = Installation(tmp_path, wheel, "postgres")
    check(installation, redis_path)
    said = installation.batchmill("db", "current", "--json", BATCHMILL_DATABASE_URL=postgresql_url)
    assert json.loads(said)["revision"] == json.loads(said)["works_with"]


def test_other_code_may_have_the_names_of_its_rooms(wheel: Path, tmp_path: Path, redis_path: str) -> None:
    """Another distribution beside it, and the user's own folders on PYTHONPATH."""
    installation = Installation(tmp_path, wheel)
    (libraries,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    for folder in (libraries, tmp_path / "mine"):
        for name in ("jobs", "producer", "worker", "migrations"):
            (folder / name).mkdir(parents=True)
            (folder / name / "__init__.py").write_text(f"raise SystemExit('the {name} of others ran')\n")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\ntwo\n")
    mine = {"PYTHONPATH": str(tmp_path / "mine")}
    done = installation.run("batchmill", "run", prompts, "-m", "echo", path=redis_path, **mine)
    assert (done.returncode, len(done.stdout.splitlines())) == (0, 2), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("extra", sorted(set(EXTRAS) - {"postgres", "test"}))
def test_every_extra_installs_alone(wheel: Path, tmp_path: Path, redis_path: str, extra: str) -> None:
    installation = Installation(tmp_path, wheel, extra)
    check(installation, "" if extra == "embedded" else redis_path)
    run_echo(installation, "" if extra == "embedded" else redis_path)
    if extra == "worker":
        words = ["-m", "demo", "-q", "nf4", "--device", "cpu", "--max-tokens", "4"]
        said = installation.batchmill("run", tmp_path / "prompts.txt", *words, path=redis_path)
        assert len(said.splitlines()) == 2
