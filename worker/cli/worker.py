"""The `worker` command: one worker in this process, or one per device under a supervisor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import click

from batchmill.jobs.configuration.flags import (
    DEVICE_HELP,
    ENGINE_FLAGS,
    PLACEMENT_FLAGS,
    QUANTIZATION_HELP,
    check_label,
)
from batchmill.jobs.configuration.option_groups import DEVICE, ENGINE, MODEL
from batchmill.jobs.configuration.settings import load_settings
from batchmill.jobs.errors import UsageError
from batchmill.jobs.models.adapters import Adapter, check_all
from batchmill.jobs.models.spec import DEMO, ECHO, ModelSpec
from batchmill.jobs.runtime.command_errors import one_line_errors
from batchmill.jobs.runtime.failpoints import arm
from batchmill.jobs.runtime.log_file import log_path
from batchmill.jobs.runtime.logs import configure_logs, get_logger
from batchmill.jobs.runtime.waiting import tell_by
from batchmill.migrations.revisions import open_store
from batchmill.worker.cli.commands import WorkerCommand, complete_model
from batchmill.worker.devices.placement import Placement, each_worker, parse_each
from batchmill.worker.devices.selection import AUTO, all_cuda_devices
from batchmill.worker.process.own_log import make_place
from batchmill.worker.process.parent import run_worker
from batchmill.worker.process.supervisor import SUPERVISOR, Supervisor
from batchmill.worker.process.worker_options import WorkerOptions

log = get_logger(__name__)


def _flags(command: Callable[..., Any]) -> Callable[..., Any]:
    for each in reversed((*PLACEMENT_FLAGS, *ENGINE_FLAGS)):
        option = click.option(
            each.name, each.setting, metavar=each.values, is_flag=each.values is None, default=None, help=each.help
        )
        command = option(command)
    return command


@click.command(
    name="worker",
    cls=WorkerCommand,
    groups={**MODEL, **DEVICE, **ENGINE, "Worker": ("name", "exit_when_idle")},
    epilog="Example: batchmill worker -m meta-llama/Llama-3.1-8B-Instruct -q nf4 --device cuda:0",
)
@click.option(
    "-m", "--model", required=True, shell_complete=complete_model, help=f"Hugging Face id, folder, {DEMO} or {ECHO}."
)
@click.option("-q", "--quantization", help=QUANTIZATION_HELP)
@click.option("--revision", help="Branch, tag or commit on the Hugging Face Hub.")
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="NAME=PATH_OR_ID",
    help="LoRA adapter for requests that name it; a Hugging Face id may end in @REVISION (repeatable).",
)
@click.option("--device", default=None, help=DEVICE_HELP)
@click.option(
    "--devices",
    default=None,
    help="Run a worker per device, restarted if it dies: 0,1 or cpu or all; 0+1,2+3 is two workers of two GPUs each.",
)
@click.option("--name", help="Name of the worker in `batchmill workers`.")
@click.option(
    "--exit-when-idle", type=click.FloatRange(min=0), metavar="SECONDS", help="Exit after this time without work."
)
@click.option("--share-device", is_flag=True, help="Share a GPU with another worker.")
@_flags
@click.option("--job", "only_job", hidden=True, help="Serve this job alone.")
@one_line_errors()
def main(
    model: str,
    quantization: str | None,
    revision: str | None,
    adapters: tuple[str, ...],
    device: str | None,
    devices: str | None,
    name: str | None,
    exit_when_idle: float | None,
    share_device: bool,
    only_job: str | None,
    **flags: Any,
) -> None:
    """Run a worker, which holds one quantized model on its device and answers requests from its queue.

    It takes batches of every job with the same model, revision and quantization, until it is stopped (Ctrl-C or
    SIGTERM): then it saves finished outputs and returns the rest to the queue.
    """
    check_label(name)
    placed = {each.setting: flags.pop(each.setting) for each in PLACEMENT_FLAGS}
    settings = load_settings(**flags)
    configure_logs(level=settings.log_level, form=settings.log_format)
    tell_by(log.warning)
    arm(settings.failpoint, home=settings.home)
    spec = ModelSpec.parse(
        model, quantization=quantization, default_quantization=settings.quantization, revision=revision
    )
    held = check_all(map(Adapter.parse, adapters))
    placements = _placements(spec, device, devices, placed)
    if devices is not None:
        if device is not None or name is not None:
            raise click.UsageError("--devices starts one worker per device: leave out --device and --name")
        arguments = _arguments(spec, only_job, exit_when_idle, share_device, held)
        make_place(settings.home, SUPERVISOR)
        configure_logs(level=settings.log_level, form=settings.log_format, file=log_path(settings.home, SUPERVISOR))
        Supervisor(
            placements,
            arguments,
            ends_when_idle=exit_when_idle is not None,
            settings=settings,
            store=open_store(settings),
        ).run()
        return
    run_worker(WorkerOptions(spec, placements[0], name, only_job, exit_when_idle, share_device, held), settings)


def _placements(spec: ModelSpec, device: str | None, devices: str | None, placed: dict[str, Any]) -> list[Placement]:
    """The placement of each worker; without --devices there is one. Raises UsageError."""
    if devices is None:
        placements = [Placement.parse(device or AUTO, **placed)]
    elif devices == "all" and not (gpus := all_cuda_devices()):
        raise UsageError("--devices all: torch sees no CUDA device here; use --device cpu")
    else:
        placements = parse_each(gpus if devices == "all" else each_worker(devices), **placed)
    if spec.model == ECHO and not all(each.plain for each in placements):
        raise UsageError("the echo engine holds no weights: leave out --max-memory, --device-map and --offload")
    return placements


def _arguments(
    spec: ModelSpec,
    only_job: str | None,
    exit_when_idle: float | None,
    share_device: bool,
    adapters: Sequence[Adapter],
) -> list[str]:
    arguments = spec.command_line()[2:]
    for each in adapters:
        arguments += ["--adapter", str(each)]
    if only_job is not None:
        arguments += ["--job", only_job]
    if exit_when_idle is not None:
        arguments += ["--exit-when-idle", str(exit_when_idle)]
    if share_device:
        arguments.append("--share-device")
    return arguments
