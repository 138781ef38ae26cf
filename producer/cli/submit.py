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
from batchmill.jobs.errors import UsageError
from batchmill.jobs.models.adapters import Adapter, check_all, check_name
from batchmill.jobs.requests.generation import DEFAULT_BATCH_SIZE, MAX_BATCH_SIZE, JobOptions, SamplingParams
from batchmill.jobs.runtime.files.formats import FILE_HELP, OUT_HELP, PROMPTS, written_as
from batchmill.producer.cli.commands import Command
from batchmill.producer.cli.completion import complete_file, complete_model
from batchmill.producer.requests.checks import OBJECT, BadLine
from batchmill.producer.requests.options import sampling_of_flags
from batchmill.producer.requests.strict_json import json_value
from batchmill.producer.submit import Submission

if TYPE_CHECKING:
    from batchmill.jobs.configuration.settings import Settings

_Command = Callable[..., Any]

_JOB: Groups = {
    "Job": ("out", "name", "new", "once", "idempotency_key", "wait", "batch_size"),
    "Prompts": ("form", "system", "chat_template_kwargs", "ignore_line_model"),
}
_MODEL = [
    click.option("-q", "--quantization", help=QUANTIZATION_HELP),
    click.option("--revision", help="Branch, tag or commit of a Hugging Face id."),
]
_REQUESTS = [
    click.option("--format", "form", type=click.Choice(PROMPTS), help=FILE_HELP),
    click.option("--name", help="A name for the job, for people."),
    click.option("--system", help="A system message for every request that has none of its own."),
    click.option("--chat-template-kwargs", metavar="JSON", help="An object of the chat template's own variables."),
    click.option("--max-tokens", type=click.IntRange(1), help="Longest answer, in tokens (default 256)."),
    click.option("--min-tokens", type=int, help="Shortest answer, in tokens."),
    click.option("--temperature", type=click.FloatRange(0, 100), help="0 is greedy (default 1.0)."),
    click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), help="Nucleus sampling."),
    click.option("--top-k", type=click.IntRange(1), help="Sample from so many tokens."),
    click.option("--min-p", type=float, help="Sample from what has this share of the likeliest token, 0 to 1."),
    click.option("--repetition-penalty", type=float, help="Above 1: against what prompt and answer have said."),
    click.option("--presence-penalty", type=float, help="-2 to 2: against what the answer has said."),
    click.option("--frequency-penalty", type=float, help="-2 to 2: the same, for each time that it has."),
    click.option("--n", type=int, help="Choices of each answer, 1 to 128."),
    click.option("--seed", type=click.IntRange(-(2**63), 2**63 - 1), help="A sampler of its own for each request."),
    click.option("--stop", multiple=True, help="End an answer before this text (repeatable)."),
    click.option("--ignore-eos", is_flag=True, help="Answer on after the model's end token, up to --max-tokens."),
    click.option(
        "--response-format",
        metavar="JSON",
        help="What answers have to look like: json_object, or an object as in a line's response_format.",
    ),
    click.option(
        "--batch-size",
        type=click.IntRange(1, MAX_BATCH_SIZE),
        default=DEFAULT_BATCH_SIZE,
        show_default=True,
        help="Requests that one message hands to one worker.",
    ),
    click.option("--ignore-line-model", is_flag=True, help="Run lines that name another model, too."),
]

#: Those of the flags above that SamplingParams has by the same name, and with the same value.
_SAMPLING = (
    "max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "n", "seed",
)  # fmt: skip
_ANSWERS: Groups = {"Answers": (*_SAMPLING, "stop", "ignore_eos", "response_format")}

_ADAPTER = click.option(
    "--adapter",
    metavar="NAME=PATH_OR_ID[@REVISION]",
    multiple=True,
    help="A LoRA adapter that lines may name (repeatable).",
)
_SHARE = click.option("--share-device", is_flag=True, help="Work on a GPU that another worker holds, too.")
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
    help="Hugging Face id, folder, demo or echo (default: the file's one model).",
)
@_with(_MODEL)
@click.option("--remote-path", is_flag=True, help="MODEL is a folder that only the workers have.")
@_with(_REQUESTS)
@click.option("--adapter", metavar="NAME", multiple=True, help="A LoRA adapter that lines may name (repeatable).")
@click.option("--idempotency-key", metavar="KEY", help="Your name for this job: a second submit of it finds the first.")
@click.option("--once", is_flag=True, help="Find the job of the same file, model and options, if there is one.")
@click.option("--wait", is_flag=True, help="Wait until the job has ended.")
def submit(wait: bool, **options: Any) -> None:
    """Store FILE (- for stdin) as a job and wake its workers; prints the job's id.

    FILE is JSONL (OpenAI Batch lines, {"messages": [...]} or {"prompt": "..."}) or text with a prompt per line.
    """
    from batchmill.jobs.broker.client import Broker
    from batchmill.jobs.errors import BrokerUnavailable
    from batchmill.jobs.runtime.files.output_file import check_target
    from batchmill.migrations import open_store
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
    # A team submits before its workers start, so that a likely slip in the model's name is a line below; but whoever
    # waits would wait for nobody.
    vet = partial(refuse_slip, store=store) if wait else lambda _: None
    with asked_first(submission, store=store):
        job_id, spec, is_new = load_once(submission, store=store, settings=settings, vet=vet)
    unsent = None
    try:
        send_wakeups(spec, store=store, broker=Broker.of(settings))
    except BrokerUnavailable as error:
        unsent = f"the job is stored, and workers take it up by themselves: {error}"
    with standard_output(f"the id of job {job_id}") as stdout:
        stdout.write(f"{job_id}\n")
    status = JobStatus.read(store, job_id, settings)
    if unsent is not None:
        # Where no mill is up, its Redis is not either, and what starts both is a line below.
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
@click.option("--new", is_flag=True, help="Run it anew, even if it has been run before.")
@_with(_REQUESTS)
def run(out: Path | None, device: str, share_device: bool, new: bool, **options: Any) -> None:
    """Answer the prompts of FILE on this machine: everything in one command, nothing to set up.

    The same command continues a job that was interrupted, and exports one that has ended. Where an `up` of this home
    holds the model, its workers answer.
    """
    from batchmill.jobs.runtime.files.output_file import model_files
    from batchmill.producer.cli.local import OwnWorker, run_file
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
    """Run Redis, store and workers on this machine until Ctrl-C, so that other terminals can submit."""
    from batchmill.jobs.models.spec import ModelSpec
    from batchmill.producer.cli.local import run_mill

    words = _worker_words(flags, adapters=_adapters(adapter), share_device=share_device)
    settings = _settings(**flags)
    spec = ModelSpec.parse(
        model, quantization=quantization, default_quantization=settings.quantization, revision=revision
    )
    run_mill(spec, devices=devices or ("auto",), worker_words=words, settings=settings)


def _worker_words(flags: dict[str, Any], *, adapters: Sequence[Adapter], share_device: bool) -> list[str]:
    """The flags that are the worker's alone, as it is started with them; they are taken out of `flags`."""
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
    """`adapters`: those that --adapter says all of, where the same command starts the workers."""
    _refuse_no_text(options)
    check_label(options["name"])
    names = _adapter_names(options["adapter"]) if adapters is None else [each.name for each in adapters]
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
        options=JobOptions(options["system"], _sampling(options), _chat_template_kwargs(options), declared),
        adapters=adapters or (),
        batch_size=options["batch_size"],
        command=os.fsencode(shlex.join(["batchmill", *sys.argv[1:]])).decode(errors="backslashreplace"),
        idempotency_key=options.get("idempotency_key"),
        once=options.get("once", False),
    )


def _adapters(written: Sequence[str]) -> tuple[Adapter, ...]:
    return check_all(Adapter.parse(each) for each in written)


def _adapter_names(written: Sequence[str]) -> list[str]:
    for each in written:
        name, sign, _ = each.partition("=")
        if sign:
            raise UsageError(
                f"--adapter {each!r}: a submit takes the name alone, --adapter {name}; the worker that holds it says "
                f"where it is: batchmill worker -m MODEL --adapter {each}"
            )
    return [check_name(each) for each in written]


def _sampling(options: dict[str, Any]) -> SamplingParams:
    form = options["response_format"]
    asked = {name: options[name] for name in _SAMPLING} | {
        "stop": list(options["stop"]),
        "ignore_eos": options["ignore_eos"] or None,
        "response_format": form if form is None else _response_format(form),
    }
    try:
        return sampling_of_flags(asked)
    except BadLine as error:
        raise _bad_flag(*error.at.split(".", 1), error.what) from None


def _response_format(written: str) -> Any:
    """Whoever writes no JSON names a type alone."""
    return _json("response_format", written) if written.lstrip().startswith("{") else {"type": written}


def _chat_template_kwargs(options: dict[str, Any]) -> dict[str, Any] | None:
    written = options["chat_template_kwargs"]
    if written is None:
        return None
    try:
        return OBJECT(_json("chat_template_kwargs", written)) or None
    except BadLine as error:
        raise _bad_flag("chat_template_kwargs", str(error)) from None


def _json(name: str, written: str) -> Any:
    try:
        return json_value(written)
    except BadLine as error:
        raise _bad_flag(name, str(error)) from None


def _bad_flag(name: str, *what: str) -> UsageError:
    return UsageError(f"--{name.replace('_', '-')} {' '.join(what)}")


def _refuse_no_text(options: dict[str, Any]) -> None:
    """A file's name may be any bytes; what is stored as text has to be some."""
    for name, value in options.items():
        for text in value if isinstance(value, tuple) else (value,):
            if name != "file" and isinstance(text, str) and not _is_utf8(text):
                raise UsageError(f"--{name.replace('_', '-')} is not UTF-8; the terminal's locale may be another")


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


COMMANDS: tuple[click.Command, ...] = (run, up, submit)
