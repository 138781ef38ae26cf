"""deploy/compose.yaml, as far as no container engine is needed to check it, and with one where it is installed."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from batchmill.jobs.configuration.settings import PREFIX, Settings
from tests.support.deploy import (
    COMPOSE,
    DEPLOY,
    DOCKERFILES,
    PROJECT,
    SERVICES,
    WORKERS,
    filled_in,
    instructions,
    interpolated,
    last_of,
    unit,
)
from tests.support.paths import ROOT
from tests.support.shown import parsed

#: A worker is given its drain time and so long to end Celery and itself.
END_SECONDS = 5


def in_seconds(written: str) -> float:
    return float(written.removesuffix("s"))


def images() -> list[str]:
    bases = [
        rest.split()[0] for name in DOCKERFILES for instruction, rest in instructions(name) if instruction == "FROM"
    ]
    return sorted({*bases, *(service["image"] for service in SERVICES.values())})


@pytest.mark.parametrize("image", images())
def test_every_image_is_pinned(image: str) -> None:
    name, _, tag = image.partition(":")
    assert re.match(r"\d", tag), "a tag that begins with a version"
    assert name != "redis" or re.fullmatch(r"8\.\d+", tag), "Redis by its minor version"
    assert name != "postgres" or tag.startswith("18"), "PostgreSQL by its major version"
    assert not name.startswith("batchmill") or tag == PROJECT["version"]


def test_images_that_are_built_here_are_never_pulled() -> None:
    for name, service in SERVICES.items():
        if service["image"].startswith("batchmill"):
            assert service["pull_policy"] == "never", name
            assert (DEPLOY / service["build"]["context"]).resolve() == ROOT
            assert (ROOT / service["build"]["dockerfile"]).is_file()


def test_each_worker_has_one_gpu_of_its_own_and_its_number_in_its_name() -> None:
    seen = []
    for name in WORKERS:
        (device,) = SERVICES[name]["deploy"]["resources"]["reservations"]["devices"]
        (number,) = device["device_ids"]
        assert device == {"driver": "nvidia", "device_ids": [number], "capabilities": ["gpu"]}
        assert isinstance(number, str), "compose wants device ids as strings"
        assert name == f"worker-gpu{number}"
        options = parsed([interpolated(word, filled_in()) for word in SERVICES[name]["command"]]).params
        assert (options["device"], options["name"], options["devices"]) == ("cuda:0", f"gpu{number}", None)
        seen.append(number)
    assert len(seen) == len(set(seen)) >= 2
    assert {name for name, service in SERVICES.items() if "deploy" in service or "gpus" in service} == set(WORKERS)


def test_nothing_is_published_and_only_workers_reach_outside() -> None:
    inside = {name for name, network in COMPOSE["networks"].items() if network.get("internal") is True}
    for name, service in SERVICES.items():
        assert not {"ports", "network_mode", "links", "external_links"} & set(service), name
        if name in WORKERS:
            assert set(service["networks"]) & inside, name
        else:
            assert set(service["networks"]) <= inside, name


@pytest.mark.parametrize("name", SERVICES)
def test_services_run_without_privileges_on_a_read_only_system(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert "/tmp" in service["tmpfs"]
    assert service["init"] is True
    assert not {"privileged", "cap_add", "devices", "pid", "ipc", "userns_mode"} & set(service)
    user = service.get("user") or last_of(Path(service["build"]["dockerfile"]).name, "USER")
    uid, _, gid = user.partition(":")
    assert int(uid) > 0
    assert int(gid) > 0


def test_the_stores_say_when_they_are_healthy_and_keep_their_data() -> None:
    for name, folder in (("redis", "/data"), ("postgres", "/var/lib/postgresql")):
        service = SERVICES[name]
        assert service["healthcheck"]["test"][0] in ("CMD", "CMD-SHELL")
        (volume,) = service["volumes"]
        source, target = volume.split(":")
        assert target == folder
        assert source in COMPOSE["volumes"]


def test_redis_asks_for_a_password_keeps_its_queues_and_evicts_nothing() -> None:
    shell, _, script = SERVICES["redis"]["command"]
    assert shell == "sh"
    words = shlex.split(interpolated(script, filled_in()).replace("\\\n", " "))
    server = words[words.index("redis-server") + 1 :]
    options = dict(zip(server[1::2], server[2::2], strict=True))
    assert options["--appendonly"] == "yes"
    assert options["--maxmemory-policy"] == "noeviction"
    assert 'requirepass $REDISCLI_AUTH" > ' + server[0] in interpolated(script, filled_in())
    assert not any("filled" in word for word in words), "a password that lists of processes show"


def test_everything_waits_for_the_tables_and_for_redis() -> None:
    assert SERVICES["migrate"]["depends_on"] == {"postgres": {"condition": "service_healthy"}}
    for name in [*WORKERS, "producer"]:
        assert SERVICES[name]["depends_on"] == {
            "redis": {"condition": "service_healthy"},
            "migrate": {"condition": "service_completed_successfully"},
        }


def test_up_starts_workers_again_and_no_producer() -> None:
    assert {name for name, service in SERVICES.items() if service.get("restart") == "unless-stopped"} == {
        "redis",
        "postgres",
        *WORKERS,
    }
    assert {name for name, service in SERVICES.items() if "profiles" in service} == {"producer"}


def test_fetched_models_outlive_a_worker() -> None:
    environment = dict(word.split("=", 1) for word in shlex.split(last_of("worker.Dockerfile", "ENV")))
    for name in WORKERS:
        (volume,) = SERVICES[name]["volumes"]
        source, target = volume.split(":")
        assert source in COMPOSE["volumes"]
        assert Path(environment["HF_HOME"]).is_relative_to(target)
        assert environment["HOME"] == target


def test_a_stopping_worker_has_longer_than_its_drain() -> None:
    needed = Settings.model_fields["drain_seconds"].default + END_SECONDS
    assert in_seconds(unit()["TimeoutStopSec"][-1]) >= needed
    for name in WORKERS:
        assert in_seconds(SERVICES[name]["stop_grace_period"]) >= needed
        assert f"{PREFIX}DRAIN_SECONDS" not in SERVICES[name]["environment"]


def has_compose() -> bool:
    command = shutil.which("docker")
    return command is not None and not subprocess.run([command, "compose", "version"], capture_output=True).returncode


@pytest.mark.skipif(not has_compose(), reason="docker compose is not installed")
def test_docker_compose_takes_the_file(tmp_path: Path) -> None:
    environment = tmp_path / "env"
    environment.write_text("".join(f"{name}={value}\n" for name, value in filled_in().items()))
    command = ["docker", "compose", "-f", str(DEPLOY / "compose.yaml"), "--env-file", str(environment)]
    done = subprocess.run([*command, "--profile", "tools", "config", "-q"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
