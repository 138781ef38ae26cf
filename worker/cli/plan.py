"""The `plan` command: what a model takes in every quantization and what fits, before anything of it is loaded."""

from __future__ import annotations

import json
import logging
import socket
from typing import TYPE_CHECKING

import click

from batchmill.jobs.configuration.option_groups import MODEL
from batchmill.jobs.configuration.settings import Settings, load_settings
from batchmill.jobs.errors import StoreError, UsageError
from batchmill.jobs.models.misspellings import refuse_slip
from batchmill.jobs.models.spec import DEMO, ECHO, ModelSpec
from batchmill.jobs.runtime.command_errors import one_line_errors
from batchmill.jobs.runtime.fitted import fitted, terminal_width
from batchmill.jobs.runtime.sizes import bytes_of
from batchmill.jobs.store.store import Store
from batchmill.jobs.store.tables import REVISION
from batchmill.jobs.store.views.measured_speeds import Speed
from batchmill.worker.cli.commands import WorkerCommand, takes_model
from batchmill.worker.devices.placement import TOGETHER, each_worker
from batchmill.worker.devices.selection import CPU, use_all_cores

if TYPE_CHECKING:
    from batchmill.worker.plan.hardware import Hardware


@click.command(
    name="plan",
    cls=WorkerCommand,
    groups={**MODEL, "Device": ("devices", "gpu_memory"), "Requests": ("context", "rows")},
    epilog="Example: batchmill plan meta-llama/Llama-3.1-8B-Instruct --gpu-memory 24GiB --context 4096",
)
@takes_model
@click.option("--revision", help="Branch, tag or commit on the Hugging Face Hub.")
@click.option(
    "--devices", help="Devices: 0,1 or 0+1 (split over both), all, or cpu (default: the GPUs here, or the CPU)."
)
@click.option("--gpu-memory", metavar="SIZE", help="Plan for a GPU with this much memory, such as 24GiB.")
@click.option(
    "--context",
    type=click.IntRange(1),
    metavar="N",
    help="Maximum number of tokens in a prompt and its answer together.",
)
@click.option("--rows", type=click.IntRange(1), metavar="N", help="Number of requests to process at once.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@one_line_errors()
def main(
    model: str,
    revision: str | None,
    devices: str | None,
    gpu_memory: str | None,
    context: int | None,
    rows: int | None,
    as_json: bool,
) -> None:
    """Show how much memory MODEL needs in each quantization, what fits, and how fast it can be.

    Only its configuration is read, and the headers of its weights if they are quantized already; no weights are
    downloaded or loaded. MODEL is a Hugging Face id, a folder, or demo.
    """
    if gpu_memory is not None and devices is not None:
        raise click.UsageError("--gpu-memory pretends a GPU, and --devices are real ones: leave one of them out")
    settings = load_settings(context_tokens=context, engine_rows=rows)
    spec = ModelSpec.parse(model, revision=revision)
    if spec.model == ECHO:
        raise UsageError(f"{ECHO} holds no weights, so there is nothing to plan; name a model, such as {DEMO}")
    refuse_slip(spec)
    total_bytes = bytes_of(gpu_memory) if gpu_memory is not None else None
    for line in _planned(spec, settings, devices, total_bytes, as_json=as_json):
        click.echo(line)


def _planned(
    spec: ModelSpec, settings: Settings, devices: str | None, gpu_bytes: int | None, *, as_json: bool
) -> list[str]:
    """The report as it is printed."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # says at its import which kernels it lacks
    from batchmill.worker.engine.options import EngineOptions
    from batchmill.worker.models.load import loading
    from batchmill.worker.models.source import configuration
    from batchmill.worker.models.vetting import vet_configuration
    from batchmill.worker.plan.hardware import pretended_gpu
    from batchmill.worker.plan.model import PlannedModel
    from batchmill.worker.plan.report import report
    from batchmill.worker.plan.table import to_json, to_lines

    hardware = [pretended_gpu(gpu_bytes)] if gpu_bytes is not None else _devices(devices)
    with loading(spec):
        folder = configuration(spec)
        vet_configuration(folder)
        planned = report(PlannedModel(spec, folder), hardware, EngineOptions.of(settings), _recorded(spec, settings))
    context_asked = settings.context_tokens is not None
    if as_json:
        return [json.dumps(to_json(planned, context_asked=context_asked))]
    width = terminal_width()
    return list(fitted(to_lines(planned, context_asked=context_asked, width=width), indent=2, width=width))


def _devices(written: str | None) -> list[Hardware]:
    """The devices that are named, or all GPUs of this machine, or its CPU where it has none. Raises UsageError."""
    import torch

    from batchmill.worker.plan.hardware import joined, this_cpu, this_gpu

    here = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if written in (None, "all"):
        if written == "all" and not here:
            raise UsageError("--devices all: torch sees no CUDA device here; use --devices cpu or --gpu-memory 24GiB")
        named = [[each] for each in here or [CPU]]
    else:
        named = [each.split(TOGETHER) for each in each_worker(str(written))]
    devices = []
    for together in named:
        for each in together:
            if each != CPU and each not in here:
                seen = ", ".join(here) or "none"
                raise UsageError(
                    f"--devices: torch sees no {each} here, but {seen}; pretend one with --gpu-memory 24GiB"
                )
        if together == [CPU]:
            use_all_cores()
            devices.append(this_cpu())
        else:
            devices.append(joined([this_gpu(int(each.removeprefix("cuda:"))) for each in together]))
    return devices


def _recorded(spec: ModelSpec, settings: Settings) -> list[Speed]:
    """The speeds of this machine's workers with this model; none where there is no store, and none is made."""
    store = Store(settings.database, busy_seconds=settings.worker_busy_seconds, read_only=True)
    try:
        if store.revision() != REVISION:
            return []
        return store.speeds.of(spec, host=socket.gethostname())
    except StoreError as error:
        click.echo(f"batchmill: no speeds of earlier runs: {error}", err=True)
        return []
    finally:
        store.close()
