"""The files of deploy/, as far as no container engine and no running systemd is needed to check them."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from batchmill.jobs.configuration.settings import PREFIX, Settings, load_settings
from batchmill.jobs.models.spec import ModelSpec
from tests.support.paths import ROOT
from tests.support.processes.wheel import build_wheel
from tests.support.shown import parsed

DEPLOY = ROOT / "deploy"
UNIT = DEPLOY / "batchmill-worker@.service"
DOCKERFILES = ("producer.Dockerfile", "worker.Dockerfile")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
WORKERS = sorted(name for name in SERVICES if name.startswith("worker-"))
#: References that compose replaces: `$$`, `$NAME`, `${NAME}`, or `${NAME` with an operator and what follows it.
VARIABLE = re.compile(r"\$(?:(\$)|\{?(\w+)(?:(:?[-?+])([^}]*))?\}?)")
#: A worker is given its drain time and so long to end Celery and itself.
END_SECONDS = 5


def deploy_files() -> list[Path]:
    return sorted(path for path in DEPLOY.iterdir() if path.is_file())


def assignments(name: str) -> dict[str, str]:
    """The NAME=VALUE lines of an environment file; those that are commented out are left out."""
    lines = [line for line in (DEPLOY / name).read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def interpolated(text: str, values: dict[str, str]) -> str:
    """The string as compose interpolates it. An empty or missing variable that is required is a KeyError."""

    def value(found: re.Match[str]) -> str:
        dollar, name, operator, default = found.groups()
        if dollar:
            return "$"
        if values.get(name):
            return values[name]
        if operator in ("-", ":-"):
            return default
        raise KeyError(name)

    return VARIABLE.sub(value, text)


def filled_in() -> dict[str, str]:
    """.env as a user would fill it in."""
    return {name: value or "filled" for name, value in assignments(".env.example").items()}


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile, each as its name and the rest."""
    lines = [line for line in (DEPLOY / dockerfile).read_text().splitlines() if line and not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [(line.split(None, 1)[0], line.split(None, 1)[1].strip()) for line in joined]


def last_of(dockerfile: str, name: str) -> str:
    return [rest for instruction, rest in instructions(dockerfile) if instruction == name][-1]


def copied(dockerfile: str) -> list[str]:
    """The paths of the repository that a Dockerfile copies."""
    copies = [rest.split() for name, rest in instructions(dockerfile) if name in ("COPY", "ADD")]
    return [source for words in copies if not words[0].startswith("--from") for source in words[:-1]]


def unit() -> dict[str, list[str]]:
    """The keys of the systemd unit, each with its values in their order."""
    keys: dict[str, list[str]] = {}
    for line in UNIT.read_text().splitlines():
        if line and line[0] not in "#[":
            key, value = line.split("=", 1)
            keys.setdefault(key, []).append(value)
    return keys


def in_seconds(written: str) -> float:
    return float(written.removesuffix("s"))


# Command lines


def compose_commands() -> Iterator[tuple[str, list[str]]]:
    for name, service in SERVICES.items():
        if "build" in service and "command" in service:
            yield f"compose {name}", [interpolated(word, filled_in()) for word in service["command"]]


def unit_commands() -> Iterator[tuple[str, list[str]]]:
    values = assignments("worker.env.example")
    (line,) = unit()["ExecStart"]
    line = re.sub(r"\$\{?(\w+)\}?", lambda found: values[found[1]], line.replace("%i", "0"))
    yield "unit", shlex.split(line)[1:]


def shell_lines() -> list[list[str]]:
    """The commands in the README's blocks, each up to its first redirection."""
    blocks = re.findall(r"^```sh\n(.*?)^```", (DEPLOY / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    return [re.split(r"\0[<>|]\0", "\0".join(words))[0].split("\0") for words in lines if words]


def readme_commands() -> Iterator[tuple[str, list[str]]]:
    for words in shell_lines():
        if words[:3] == ["docker", "compose", "run"] and "producer" in words:
            yield "README", words[words.index("producer") + 1 :]
        for place, word in enumerate(words):
            if word.endswith("/bin/batchmill"):
                yield "README", words[place + 1 :]


def quoted_commands() -> Iterator[tuple[str, list[str]]]:
    """Commands in prose and comments, such as `batchmill workers`."""
    for path in deploy_files():
        for line in re.findall(r"`batchmill ([^`]+)`", path.read_text()):
            words = line.split()
            if len(words) == 1:  # named without what it needs
                words.append("--help")
            yield path.name, words


COMMAND_LINES = [*compose_commands(), *unit_commands(), *readme_commands(), *quoted_commands()]


@pytest.mark.parametrize(("where", "arguments"), COMMAND_LINES, ids=[" ".join([a, *b]) for a, b in COMMAND_LINES])
def test_every_command_line_is_one_that_batchmill_takes(where: str, arguments: list[str]) -> None:
    with suppress(click.exceptions.Exit):  # of --help
        context = parsed(arguments)
        if "quantization" in context.params:
            ModelSpec.parse(context.params["model"], quantization=context.params["quantization"])


def test_command_lines_are_found_in_every_kind_of_file() -> None:
    found = {where: arguments[0] for where, arguments in COMMAND_LINES}
    assert found["compose migrate"] == "db"
    assert {found[f"compose {name}"] for name in WORKERS} == {"worker"} == {found["unit"]}
    assert {arguments[0] for where, arguments in COMMAND_LINES if where == "README"} >= {
        "submit",
        "status",
        "results",
        "workers",
        "db",
    }


@pytest.mark.parametrize("line", ["submit - --modell x", "dbb upgrade", "db downgrade", "worker -m echo --gpu 0"])
def test_a_command_line_that_batchmill_refuses_is_noticed(line: str) -> None:
    with pytest.raises(click.UsageError):
        parsed(line.split())


def test_the_readme_names_services_and_files_that_exist() -> None:
    text = (DEPLOY / "README.md").read_text()
    named = {word for words in shell_lines() if words[:2] == ["docker", "compose"] for word in words[3:]}
    services = {word for word in named if re.match(r"worker-|producer$|migrate$|redis$|postgres$", word)}
    assert {"producer", "migrate", *WORKERS} <= services <= set(SERVICES)
    for name in re.findall(r"\bdeploy/([\w.@-]+)", text):
        assert (DEPLOY / name).is_file(), name


# Settings and variables


def test_every_setting_named_in_deploy_exists() -> None:
    known = {f"{PREFIX}{name.upper()}" for name in Settings.model_fields}
    named = {name for path in deploy_files() for name in re.findall(rf"{PREFIX}[A-Z0-9_]+", path.read_text())}
    assert {f"{PREFIX}BROKER_URL", f"{PREFIX}DATABASE_URL"} <= named <= known


def containers() -> list[tuple[str, dict[str, str]]]:
    """The services that run batchmill, with their environment."""
    environments = {name: service["environment"] for name, service in SERVICES.items() if "build" in service}
    return [
        (name, {key: interpolated(v, filled_in()) for key, v in each.items()}) for name, each in environments.items()
    ]


@pytest.mark.parametrize(
    "environment",
    [each for _, each in containers()] + [assignments("worker.env.example")],
    ids=[name for name, _ in containers()] + ["unit"],
)
def test_settings_are_accepted_and_name_shared_services(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    settings = load_settings()
    assert not settings.embedded_broker
    assert not settings.embedded_store
    assert ":filled@redis:" in settings.broker_url or ":PASSWORD@" in settings.broker_url
    assert ":filled@postgres:" in settings.database_url or ":PASSWORD@" in settings.database_url


def test_compose_and_its_env_example_name_the_same_variables() -> None:
    used = {found[2] for found in VARIABLE.finditer((DEPLOY / "compose.yaml").read_text()) if found[2]}
    assert used == set(assignments(".env.example"))


def test_passwords_have_to_be_set_and_have_no_default() -> None:
    values = {name: value for name, value in filled_in().items() if "PASSWORD" not in name}
    for found in VARIABLE.finditer((DEPLOY / "compose.yaml").read_text()):
        if found[2] and "PASSWORD" in found[2]:
            assert found[3] == ":?", found[0]
    assert {name for name, value in assignments(".env.example").items() if not value} >= {
        "REDIS_PASSWORD",
        "POSTGRES_PASSWORD",
    }
    with pytest.raises(KeyError, match="REDIS_PASSWORD"):
        interpolated(SERVICES["redis"]["environment"]["REDISCLI_AUTH"], values)
    with pytest.raises(KeyError, match="POSTGRES_PASSWORD"):
        interpolated(SERVICES["postgres"]["environment"]["POSTGRES_PASSWORD"], values)


def test_filled_in_environment_files_are_not_committed() -> None:
    assert ".env" in (DEPLOY / ".gitignore").read_text().splitlines()


# Services


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


# Dockerfiles


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_an_image_starts_batchmill_itself_so_that_signals_arrive(dockerfile: str) -> None:
    (script,) = json.loads(last_of(dockerfile, "ENTRYPOINT"))
    assert script in PROJECT["scripts"]
    assert last_of(dockerfile, "STOPSIGNAL") == "SIGTERM"
    assert [name for name, _ in instructions(dockerfile)].count("FROM") == 2


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_what_an_image_copies_exists_and_reaches_its_build(dockerfile: str) -> None:
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    lines = [line for line in ignore if not line.startswith("#")]
    assert lines[0] == "*", "nothing else is sent to the build, least of all an .env"
    let_through = {line.removeprefix("!") for line in lines if line.startswith("!")}
    assert set(copied(dockerfile)) == let_through
    for source in copied(dockerfile):
        assert (ROOT / source).exists(), source


def test_a_wheel_can_be_built_from_what_images_copy(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in copied(DOCKERFILES[0]):  # both copy what .dockerignore lets through
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    wheel = build_wheel(source, tmp_path / "wheels")
    assert wheel.match(f"batchmill-{PROJECT['version']}-*.whl"), "what the install line of the Dockerfile looks for"


@pytest.mark.parametrize(
    ("name", "extras"),
    [
        ("producer.Dockerfile", {"postgres"}),
        ("worker.Dockerfile", {"worker", "postgres"}),
        ("README.md", {"worker", "postgres"}),
    ],
)
def test_what_is_installed_has_the_extras_it_needs_and_no_more(name: str, extras: set[str]) -> None:
    written = re.findall(r"(?:batchmill|'\.)\[([\w,]+)\]", (DEPLOY / name).read_text())
    assert {extra for group in written for extra in group.split(",")} == extras
    assert extras <= set(PROJECT["optional-dependencies"])


def test_torch_comes_with_the_worker_extra_alone() -> None:
    extras = PROJECT["optional-dependencies"]
    torch = [name for name, needs in extras.items() if any(need.startswith("torch") for need in needs)]
    assert torch == ["worker"]
    assert not any(need.startswith("torch") for need in PROJECT["dependencies"])


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_everything_that_an_image_installs_is_pinned(dockerfile: str) -> None:
    installs = [
        part
        for instruction, rest in instructions(dockerfile)
        if instruction == "RUN"
        for part in rest.split("&&")
        if re.search(r"\bpip\b.* install\b", part)
    ]
    assert len(installs) == 2
    for part in installs:
        assert "--constraint constraints.txt" in part
    assert re.search(r"^setuptools==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)


# The systemd unit


def test_the_unit_serves_the_gpu_of_its_instance() -> None:
    keys = unit()
    (start,) = keys["ExecStart"]
    words = start.split()
    assert words[words.index("--device") + 1] == "cuda:%i"
    assert "%i" in words[words.index("--name") + 1]
    assert "CUDA_DEVICE_ORDER=PCI_BUS_ID" in " ".join(keys["Environment"]).split()


def test_the_unit_signals_the_worker_alone_and_starts_it_again_ever_more_slowly() -> None:
    keys = unit()
    expected = {
        "KillMode": "mixed",
        "KillSignal": "SIGTERM",
        "OOMPolicy": "continue",
        "Restart": "on-failure",
        "RestartPreventExitStatus": "2",
        "StartLimitIntervalSec": "0",
    }
    assert {key: keys[key] for key in expected} == {key: [value] for key, value in expected.items()}
    assert {"RestartSec", "RestartSteps", "RestartMaxDelaySec"} <= set(keys)


def test_the_unit_is_hardened_and_leaves_cuda_what_it_needs() -> None:
    keys = unit()
    for key, value in {"NoNewPrivileges": "true", "ProtectSystem": "strict", "PrivateTmp": "true"}.items():
        assert keys[key] == [value]
    assert keys["User"] != ["root"]
    closes_devices = {"PrivateDevices", "ProtectClock", "DevicePolicy", "DeviceAllow"}
    assert not (closes_devices | {"MemoryDenyWriteExecute", "ProcSubset"}) & set(keys)


def test_the_unit_writes_only_where_it_may() -> None:
    keys = unit()
    (state,) = keys["StateDirectory"]
    environment = dict(word.split("=", 1) for word in " ".join(keys["Environment"]).split())
    for folder in (*keys["WorkingDirectory"], environment["HOME"], environment["HF_HOME"]):
        assert Path(folder).is_relative_to(Path("/var/lib") / state)


def test_the_unit_finds_every_variable_of_its_command_in_its_environment_file() -> None:
    (start,) = unit()["ExecStart"]
    variables = set(re.findall(r"\$\{?(\w+)", start))
    assert variables <= set(assignments("worker.env.example"))
    assert not any(name.startswith(PREFIX) for name in variables), "those are settings, and unknown ones are refused"


# Checks by tools that may not be installed


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    version = int(subprocess.check_output(["systemd-analyze", "--version"], text=True).split()[1].split(".")[0])
    # Programs that are not installed here would be complained about.
    text = re.sub(r"/(?:opt|usr)/\S*/(?:batchmill|nvidia-modprobe)", shutil.which("true") or "", UNIT.read_text())
    (tmp_path / UNIT.name).write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(tmp_path / UNIT.name)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    since_254 = r"Unknown key (?:name )?'(?:RestartSteps|RestartMaxDelaySec)'"
    complaints = [line for line in done.stderr.splitlines() if "batchmill-worker@" in line]
    assert [line for line in complaints if version >= 254 or not re.search(since_254, line)] == []


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
