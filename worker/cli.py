"""The `worker` command: one worker in this process, or one per device under a supervisor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from jobs.errors import UsageError
from jobs.exits import one_line_errors
from jobs.failpoints import arm
from jobs.flags import ENGINE_FLAGS, QUANTIZATION_HELP
from jobs.logs import configure_logs
from jobs.settings import load_settings
from jobs.spec import DEMO, ECHO, ModelSpec
from migrations import open_store
from worker.devices import all_cuda_devices
from worker.keeper import WorkerOptions
from worker.parent import run_worker
from worker.supervisor import Supervisor


def _engine_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    for each in reversed(ENGINE_FLAGS):
        option = click.option(
            each.name, each.setting, metavar=each.values, is_flag=each.values is None, default=None, help=each.help
        )
        command = option(command)
    return command


@click.command(
    name="worker",
    epilog="Example: batchmill worker -m meta-llama/Llama-3.1-8B-Instruct -q nf4 --device cuda:0",
)
@click.option("-m", "--model", required=True, help=f"Hugging Face id, folder, {DEMO} or {ECHO}.")
@click.option("-q", "--quantization", help=QUANTIZATION_HELP)
@click.option("--revision", help="Branch, tag or commit of a Hugging Face id.")
@click.option("--device", default=None, help="auto (default), cpu, cuda or cuda:N.")
@click.option("--devices", default=None, help="One worker per device, restarted when it dies: 0,1 or cpu or all.")
@click.option("--name", help="Told apart by it in `batchmill workers`.")
@click.option(
    "--exit-when-idle", type=click.FloatRange(min=0), metavar="SECONDS", help="End after so long without work."
)
@click.option("--share-device", is_flag=True, help="Work on a GPU that another worker holds, too.")
@_engine_flags
@click.option("--job", "only_job", hidden=True, help="Serve this job alone.")
@one_line_errors()
def main(
    model: str,
    quantization: str | None,
    revision: str | None,
    device: str | None,
    devices: str | None,
    name: str | None,
    exit_when_idle: float | None,
    share_device: bool,
    only_job: str | None,
    **engine: Any,
) -> None:
    """Run a worker: it holds one quantized model on one device and answers the requests of its queue.

    It takes batches of every job that names the same model, revision and quantization, until it is told to end
    (Ctrl-C or SIGTERM): then it saves what is finished and hands the rest back.
    """
    settings = load_settings(**engine)
    configure_logs(settings)
    arm(settings.failpoint, home=settings.home)
    spec = ModelSpec.parse(
        model, quantization=quantization, default_quantization=settings.quantization, revision=revision
    )
    if devices is not None:
        if device is not None or name is not None:
            raise click.UsageError("--devices starts one worker per device: leave out --device and --name")
        arguments = _arguments(spec, only_job, exit_when_idle, share_device)
        Supervisor(
            _each_device(devices),
            arguments,
            ends_when_idle=exit_when_idle is not None,
            settings=settings,
            store=open_store(settings),
        ).run()
        return
    run_worker(WorkerOptions(spec, device or "auto", name, only_job, exit_when_idle, share_device), settings)


def _each_device(written: str) -> list[str]:
    """The devices of `0,1`, `cuda:0,cpu` or `all`. Raises UsageError."""
    if written == "all":
        found = all_cuda_devices()
        if not found:
            raise UsageError("--devices all: torch sees no CUDA device here; use --device cpu")
        return found
    devices = [f"cuda:{part}" if part.isdigit() else part for part in written.split(",")]
    if len(set(devices)) != len(devices) or not all(devices):
        raise UsageError(f"--devices takes different devices, such as 0,1 or all, not {written!r}")
    return devices


def _arguments(spec: ModelSpec, only_job: str | None, exit_when_idle: float | None, share_device: bool) -> list[str]:
    arguments = spec.command_line()[2:]
    if only_job is not None:
        arguments += ["--job", only_job]
    if exit_when_idle is not None:
        arguments += ["--exit-when-idle", str(exit_when_idle)]
    if share_device:
        arguments.append("--share-device")
    return arguments
