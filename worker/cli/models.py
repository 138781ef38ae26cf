"""The `models` commands: bring a model to this machine, and save a quantized copy of one.

A command imports what it needs when it runs: `pull` loads no torch.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from batchmill.jobs.errors import ModelError, UsageError
from batchmill.jobs.models.misspellings import refuse_slip
from batchmill.jobs.models.quantization import Kind
from batchmill.jobs.models.spec import DEMO, ECHO, ModelSpec
from batchmill.jobs.runtime.command_errors import one_line_errors
from batchmill.jobs.runtime.counted import counted
from batchmill.jobs.runtime.sizes import size
from batchmill.worker.cli.commands import WorkerCommand, complete_model

if TYPE_CHECKING:
    from batchmill.worker.models.hub.repository import Pulled


@click.group(name="models", epilog="Example: batchmill models pull meta-llama/Llama-3.1-8B-Instruct")
def main() -> None:
    """Download a model, or save a quantized copy of one."""


@main.command(
    cls=WorkerCommand,
    short_help="Download a model or an adapter, so that workers can start offline.",
    epilog="Example: batchmill models pull meta-llama/Llama-3.1-8B-Instruct",
)
@click.argument("model")
@click.option("--revision", help="Branch, tag or commit on the Hugging Face Hub (default: main).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@one_line_errors()
def pull(model: str, revision: str | None, as_json: bool) -> None:
    """Download a Hugging Face model or adapter, so that workers can start offline; print the folder that holds it.

    Only the files that workers need are downloaded: safetensors in one form, configuration, vocabularies, chat
    templates. If all of them are here, nothing is. HF_TOKEN, HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE apply as usual.
    """
    spec = ModelSpec.parse(model, revision=revision)
    if spec.folder is not None or spec.model in (DEMO, ECHO):
        what = "a folder of this machine" if spec.folder is not None else "part of batchmill"
        raise UsageError(f"there is nothing to fetch: {model} is {what}; name a Hugging Face id such as org/name")
    refuse_slip(spec)
    pulled = _pull(spec)
    if not pulled.asked:
        done = "the Hub could not be asked for a newer one; everything of this commit is here"
    elif pulled.fetched_bytes:
        done = "fetched"
    else:
        done = "everything is here already"
    click.echo(f"{model}: {done} ({counted(len(pulled.files), 'file')}, commit {pulled.commit})", err=True)
    click.echo(json.dumps(_as_json(spec, pulled)) if as_json else pulled.folder)


def _pull(spec: ModelSpec) -> Pulled:
    try:
        from batchmill.worker.models.hub.repository import pull
    except ImportError as error:
        raise _lacking(error) from error

    def announce(files: int, bytes_: int) -> None:
        if sys.stderr.isatty():
            click.echo(f"{spec.model}: {counted(files, 'file')} to fetch, {size(bytes_)}", err=True)

    return pull(spec.model, spec.revision, announce=announce)


def _lacking(error: ImportError) -> ModelError:
    return ModelError(f"{error.name} is not installed here: pip install 'batchmill[worker]'")


def _as_json(spec: ModelSpec, pulled: Pulled) -> dict[str, object]:
    facts = {"model": spec.model, "revision": spec.revision, **asdict(pulled)}
    return facts | {"folder": str(pulled.folder)}


@main.command(
    cls=WorkerCommand,
    short_help="Save a quantized copy of a model in a new folder.",
    epilog="Example: batchmill models quantize meta-llama/Llama-3.1-8B-Instruct llama-nf4 -q nf4",
)
@click.argument("model", shell_complete=complete_model)
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "-q", "--quantization", required=True, help="nf4, fp4 or int8; options follow a colon: nf4:double_quant=false."
)
@click.option("--revision", help="Branch, tag or commit on the Hugging Face Hub.")
@click.option("--device", default="auto", help="auto (default), cpu, cuda or cuda:N.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@one_line_errors()
def quantize(model: str, out: Path, quantization: str, revision: str | None, device: str, as_json: bool) -> None:
    """Save a quantized copy of MODEL in the folder OUT, which must be new or empty.

    The copy takes a fraction of the disk space, and loads without being quantized again: `-m OUT -q checkpoint`.
    """
    spec = ModelSpec.parse(model, quantization=quantization, revision=revision)
    refuse_slip(spec)
    from batchmill.worker.devices.selection import describe_devices, use_all_cores, visible_devices

    os.environ["CUDA_VISIBLE_DEVICES"] = visible_devices([device], os.environ)
    (info,) = describe_devices([device])
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # says at its import which kernels it lacks
    try:
        from batchmill.worker.models.quantization.quantized_copy import save_quantized
    except ImportError as error:
        raise _lacking(error) from error
    use_all_cores()
    if sys.stderr.isatty():
        click.echo(f"{spec}: loading on {info.name}, then saving to {out}", err=True)
    copy = save_quantized(spec, out, info.torch_device)
    if as_json:
        written = {"model": spec.model, "revision": spec.revision, "quantization": spec.quantization.canonical}
        figures = {"folder": str(out.resolve()), "weights_bytes": copy.weights_bytes, "seconds": round(copy.seconds, 3)}
        click.echo(json.dumps(written | figures))
        return
    click.echo(f"{out}: {size(copy.weights_bytes)} of weights in {spec.quantization}, {copy.seconds:.0f} s")
    click.echo(f"use it with: batchmill run prompts.jsonl -m {shlex.quote(_as_path(out))} -q {Kind.CHECKPOINT}")


def _as_path(out: Path) -> str:
    """The folder, spelled so that it cannot be taken for a Hugging Face id."""
    return str(out) if out.is_absolute() or str(out).startswith(".") else f"./{out}"
