"""The commands that start work: submit, run and up, with the options that they share."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from batchmill.jobs.configuration.flags import (
    DEVICE_HELP,
    ENGINE_FLAGS,
    PLACEMENT_FLAGS,
    QUANTIZATION_HELP,
    check_label,
)
from batchmill.jobs.configuration.option_groups import DEVICE, ENGINE, MODEL, Groups
from batchmill.jobs.models.adapters import Adapter, check_all
from batchmill.jobs.requests.request import DEFAULT_BATCH_SIZE, MAX_BATCH_SIZE
from batchmill.jobs.runtime.files.formats import FILE_HELP, OUT_HELP, PROMPTS, written_as
from batchmill.producer.cli.commands import Command
from batchmill.producer.cli.completion import complete_file, complete_model
from batchmill.producer.requests.job_flags import adapter_names, job_options, refuse_no_text
from batchmill.producer.requests.option_table import FLAG_GROUPS, FLAGS, OptionFlag, SamplingOption
from batchmill.producer.submission import Submission

if TYPE_CHECKING:
    from batchmill.jobs.configuration.settings import Settings

_Command = Callable[..., Any]

_JOB: Groups = {
    "Job": ("out", "name", "new", "once", "idempotency_key", "wait", "batch_size"),
    "Prompts": ("form", "system", "chat_template_kwargs", "ignore_line_model"),
}
_ANSWERS: Groups = {group: tuple(option.name for option, flag in FLAGS if flag.group == group) for group in FLAG_GROUPS}


def _sampling_flag(option: SamplingOption, flag: OptionFlag) -> _Command:
    if flag.kind is bool:
        return click.option(option.flag_name, is_flag=True, help=option.flag_help)
    metavar = "JSON" if flag.kind is dict else None
    return click.option(
        option.flag_name, type=_type(flag), metavar=metavar, multiple=flag.repeatable, help=option.flag_help
    )


def _type(flag: OptionFlag) -> click.ParamType[Any] | type:
    if flag.low is None:
        return str if flag.kind is dict else flag.kind
    if flag.kind is int:
        return click.IntRange(flag.low, flag.high)
    return click.FloatRange(flag.low, flag.high)


_MODEL = [
    click.option("-q", "--quantization", help=QUANTIZATION_HELP),
    click.option("--revision", help="Branch, tag or commit on the Hugging Face Hub."),
]
_REQUESTS = [
    click.option("--format", "form", type=click.Choice(PROMPTS), help=FILE_HELP),
    click.option("--name", help="Name of the job, shown in lists."),
    click.option("--system", help="System message for requests that have none."),
    click.option("--chat-template-kwargs", metavar="JSON", help="JSON object of variables for the chat template."),
    *(_sampling_flag(option, flag) for option, flag in FLAGS),
    click.option(
        "--batch-size",
        type=click.IntRange(1, MAX_BATCH_SIZE),
        default=DEFAULT_BATCH_SIZE,
        show_default=True,
        help="Number of requests that a worker claims together.",
    ),
    click.option("--ignore-line-model", is_flag=True, help="Also run lines that name another model."),
]

_ADAPTER = click.option(
    "--adapter",
    metavar="NAME=PATH_OR_ID[@REVISION]",
    multiple=True,
    help="LoRA adapter that lines may name (repeatable).",
)
_SHARE = click.option("--share-device", is_flag=True, help="Share a GPU with another worker.")
_PLACEMENT = [click.option(each.name, each.setting, metavar=each.values, help=each.help) for each in PLACEMENT_FLAGS]
_ENGINE = [
    click.option(
        each.name, each.setting, metavar=each.values, is_flag=each.values is None, default=None, help=each.help
    )
    for each in ENGINE_FLAGS
]


def _with(options: list[_Command]) -> _Command:
    def add(command: _Command) -> _Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


@click.command(
    cls=Command,
    groups={**MODEL, **_JOB, **_ANSWERS},
    epilog="Example: batchmill submit prompts.jsonl -m meta-llama/Llama-3.1-8B-Instruct --max-tokens 200",
)
@click.argument("file", shell_complete=complete_file)
@click.option(
    "-m",
    "--model",
    shell_complete=complete_model,
    help="Hugging Face id, folder, demo or echo (default: the model that FILE names).",
)
@_with(_MODEL)
@click.option("--remote-path", is_flag=True, help="MODEL is a folder that exists only on the workers' machines.")
@_with(_REQUESTS)
@click.option("--adapter", metavar="NAME", multiple=True, help="LoRA adapter that lines may name (repeatable).")
@click.option(
    "--idempotency-key", metavar="KEY", help="Unique key of the job: submitting it again finds the first job."
)
@click.option("--once", is_flag=True, help="Reuse the job with the same file, model and options, if any.")
@click.option("--wait", is_flag=True, help="Wait until the job ends.")
def submit(wait: bool, **options: Any) -> None:
    """Store FILE (- for stdin) as a job and notify its workers; print the job's id.

    FILE is JSONL (OpenAI Batch lines, {"messages": [...]} or {"prompt": "..."}) or text with one prompt per line.
    """
    from batchmill.jobs.broker.client import Broker
    from batchmill.jobs.errors import BrokerUnavailable
    from batchmill.jobs.runtime.files.output_file import check_target
    from batchmill.migrations.revisions import open_store
    from batchmill.producer.cli.model_name_check import asked_first, refuse_slip
    from batchmill.producer.cli.progress import require_success, say_ended, wait_for
    from batchmill.producer.files.export import standard_output
    from batchmill.producer.submit import load_once, send_wakeups
    from batchmill.producer.views.reasons import missing_lines
    from batchmill.producer.views.status import JobStatus

    settings = _settings()
    submission = _submission(options, settings)
    check_target(None, prompts=submission.path)
    store = open_store(settings)
    # A team submits before its workers start, so that a likely slip in the model's name is only a line below; with
    # --wait it is refused, since the wait would not end.
    vet = partial(refuse_slip, store=store) if wait else lambda _: None
    with asked_first(submission, store=store):
        job_id, spec, is_new = load_once(submission, store=store, settings=settings, vet=vet)
    unsent = None
    try:
        send_wakeups(spec, store=store, broker=Broker.of(settings))
    except BrokerUnavailable as error:
        unsent = f"the job is stored, and workers will find it without a wake-up: {error}"
    with standard_output(f"the id of job {job_id}") as stdout:
        stdout.write(f"{job_id}\n")
    status = JobStatus.read(store, job_id, settings)
    if unsent is not None:
        # Without a mill there is no embedded Redis either; a line below names the command that starts both.
        no_mill = settings.embedded_broker and status.missing_seconds is not None
        click.echo("the job is stored, and waits for a worker" if no_mill else unsent, err=True)
    if not is_new:
        click.echo(f"this was submitted before: job {job_id} is {status.job.state.value}", err=True)
    for line in missing_lines(status):
        click.echo(line, err=True)
    if wait:
        ended = wait_for(store, job_id, settings=settings)
        say_ended(ended)
        require_success(ended)


@click.command(
    cls=Command,
    groups={**MODEL, **_JOB, **_ANSWERS, **DEVICE, **ENGINE},
    epilog="Example: batchmill run prompts.jsonl -m ./my-model -q nf4 -o answers.jsonl",
)
@click.argument("file", shell_complete=complete_file)
@click.option(
    "-m", "--model", required=True, shell_complete=complete_model, help="Hugging Face id, folder, demo or echo."
)
@_with(_MODEL)
@click.option("-o", "--out", type=click.Path(path_type=Path), help=OUT_HELP)
@click.option("--device", default="auto", help=DEVICE_HELP)
@_with(_PLACEMENT)
@_SHARE
@_with(_ENGINE)
@_ADAPTER
@click.option("--new", is_flag=True, help="Start a new job, even if this file has been run before.")
@_with(_REQUESTS)
def run(out: Path | None, device: str, share_device: bool, new: bool, **options: Any) -> None:
    """Answer the prompts of FILE on this machine: everything in one command, nothing to set up.

    Run the same command again to continue a job that was interrupted, or to export one that has ended. If
    `batchmill up` holds the model in the same BATCHMILL_HOME, its workers answer.
    """
    from batchmill.jobs.runtime.files.output_file import model_files
    from batchmill.producer.cli.local.run import OwnWorker, run_file
    from batchmill.producer.files.export import check_out

    engine = {each.setting: options.pop(each.setting) for each in ENGINE_FLAGS}
    settings = _settings(**engine)
    adapters = _adapters(options["adapter"])
    words = _worker_words(options, adapters=adapters, share_device=share_device)
    is_own = device != "auto" or len(words) > 2 * len(adapters) or any(each is not None for each in engine.values())
    submission = _submission(options, settings, adapters)
    keep = [*settings.files, *model_files(submission.folders)]
    check_out(out, form=written_as(out), keep=keep, prompts=submission.path)
    how = OwnWorker(device, words, is_asked_for=is_own)
    run_file(submission, out=out, worker=how, new=new, settings=settings)


@click.command(cls=Command, groups={**MODEL, **DEVICE, **ENGINE}, epilog="Example: batchmill up -m demo")
@click.option(
    "-m", "--model", required=True, shell_complete=complete_model, help="Hugging Face id, folder, demo or echo."
)
@_with(_MODEL)
@click.option("--device", "devices", multiple=True, help=f"{DEVICE_HELP} Repeat it for several workers.")
@_with(_PLACEMENT)
@_SHARE
@_ADAPTER
@_with(_ENGINE)
def up(
    model: str,
    quantization: str | None,
    revision: str | None,
    adapter: tuple[str, ...],
    devices: tuple[str, ...],
    share_device: bool,
    **flags: Any,
) -> None:
    """Run Redis, the store and workers on this machine until Ctrl-C, so that other terminals can submit jobs."""
    from batchmill.jobs.models.spec import ModelSpec
    from batchmill.producer.cli.local.up import run_mill

    words = _worker_words(flags, adapters=_adapters(adapter), share_device=share_device)
    settings = _settings(**flags)
    spec = ModelSpec.parse(
        model, quantization=quantization, default_quantization=settings.quantization, revision=revision
    )
    run_mill(spec, devices=devices or ("auto",), worker_words=words, settings=settings)


def _worker_words(flags: dict[str, Any], *, adapters: Sequence[Adapter], share_device: bool) -> list[str]:
    """The flags that are the worker's alone, as words of its command line; they are taken out of `flags`."""
    words = ["--share-device"] if share_device else []
    words += [word for each in adapters for word in ("--adapter", str(each))]
    for each in PLACEMENT_FLAGS:
        value = flags.pop(each.setting)
        words += [] if value is None else [each.name, value]
    return words


def _settings(**flags: Any) -> Settings:
    from batchmill.jobs.configuration.settings import load_settings
    from batchmill.jobs.runtime.failpoints import arm
    from batchmill.jobs.runtime.logs import configure_logs

    settings = load_settings(**flags)
    # To stderr: stdout is for a job's id, or its answers.
    configure_logs(level=settings.log_level, form=settings.log_format)
    arm(settings.failpoint, home=settings.home)
    return settings


def _submission(options: dict[str, Any], settings: Settings, adapters: tuple[Adapter, ...] | None = None) -> Submission:
    """Builds the submission. `adapters`: those of --adapter with their paths, where the command starts the workers."""
    refuse_no_text(options)
    check_label(options["name"])
    names = adapter_names(options["adapter"]) if adapters is None else [each.name for each in adapters]
    declared = tuple(sorted(set(names)))
    return Submission(
        path=options["file"],
        model=options["model"],
        quantization=options["quantization"],
        default_quantization=settings.quantization,
        revision=options["revision"],
        remote_path=options.get("remote_path", False),
        form=options["form"],
        ignore_line_model=options["ignore_line_model"],
        name=options["name"],
        options=job_options(options, adapters=declared),
        adapters=adapters or (),
        batch_size=options["batch_size"],
        command=os.fsencode(shlex.join(["batchmill", *sys.argv[1:]])).decode(errors="backslashreplace"),
        idempotency_key=options.get("idempotency_key"),
        once=options.get("once", False),
    )


def _adapters(written: Sequence[str]) -> tuple[Adapter, ...]:
    return check_all(Adapter.parse(each) for each in written)


COMMANDS: tuple[click.Command, ...] = (run, up, submit)
