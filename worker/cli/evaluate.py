"""The `evaluate` command: what quantization costs on the user's own text, in figures and in a sentence."""

from __future__ import annotations

import json
import os
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import click

from batchmill.jobs.configuration.option_groups import DEVICE
from batchmill.jobs.configuration.settings import Settings, load_settings
from batchmill.jobs.errors import ModelError, NotAllSucceeded, StoreError
from batchmill.jobs.models.digests import Digests
from batchmill.jobs.models.misspellings import refuse_slip
from batchmill.jobs.runtime.command_errors import one_line_errors
from batchmill.jobs.runtime.counted import counted
from batchmill.jobs.runtime.files.output_file import check_target
from batchmill.jobs.runtime.logs import configure_logs
from batchmill.jobs.store.views.evaluations import DataFile
from batchmill.migrations.revisions import open_store
from batchmill.worker.cli.commands import WorkerCommand, takes_model
from batchmill.worker.devices.lock import DeviceLock
from batchmill.worker.devices.selection import DeviceInfo, describe_devices, use_all_cores, visible_devices
from batchmill.worker.engine.options import EngineOptions
from batchmill.worker.process.versions import versions

if TYPE_CHECKING:
    from batchmill.worker.evaluate.data.corpus import Corpus
    from batchmill.worker.evaluate.evaluation import Asked
    from batchmill.worker.evaluate.lineup import Lineup
    from batchmill.worker.evaluate.measures.measurement import Measurement, Method, Report

_COUNT = click.IntRange(min=0)
_SIZE = click.IntRange(min=2)


@click.command(
    name="evaluate",
    cls=WorkerCommand,
    groups={
        "Model": ("named", "quantizations", "baseline", "revision"),
        "Text": ("data", "tokens", "window_tokens", "stride_tokens", "divergence_places"),
        "Answers": ("continuations", "max_tokens", "match"),
        **DEVICE,
    },
    epilog="Example: batchmill evaluate demo -q nf4,int8,none --data held-out.jsonl",
)
@takes_model
@click.option(
    "-q",
    "--quantization",
    "quantizations",
    multiple=True,
    metavar="LIST",
    help="Quantizations to measure: nf4,int8:threshold=0,none (default: the setting; repeatable).",
)
@click.option(
    "--data",
    required=True,
    type=click.Path(path_type=Path),
    help='Text to measure on: .txt, or JSONL of {"text"}, {"prompt", "answer"} or {"messages", "answer"}.',
)
@click.option("--baseline", default="none", show_default=True, help="Quantization to compare the others with.")
@click.option("--revision", help="Branch, tag or commit on the Hugging Face Hub.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--share-device", is_flag=True, help="Share a GPU with a worker.")
@click.option("--tokens", type=_SIZE, default=100_000, show_default=True, help="Maximum number of tokens to score.")
@click.option(
    "--context", "window_tokens", type=_SIZE, help="Tokens in a window (default: the model's context, at most 2,048)."
)
@click.option(
    "--stride",
    "stride_tokens",
    type=click.IntRange(min=1),
    help="Tokens from one window to the next (default: half a window).",
)
@click.option(
    "--continuations", type=_COUNT, default=64, show_default=True, help="Number of greedy answers to compare."
)
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Maximum number of tokens in an answer.",
)
@click.option(
    "--kl-places",
    "divergence_places",
    type=_COUNT,
    default=10_000,
    show_default=True,
    help="Number of tokens to compute the KL divergence at; each takes 4 bytes per vocabulary entry in TMPDIR.",
)
@click.option(
    "--match",
    type=click.Choice(["exact", "regex"]),
    default="exact",
    show_default=True,
    help="Match answers exactly, or with the data's answers as regexes.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), metavar="CHART", help="Write a chart to this .png or .svg file."
)
@one_line_errors()
def main(
    model: str,
    quantizations: tuple[str, ...],
    data: Path,
    baseline: str,
    revision: str | None,
    device: str,
    share_device: bool,
    as_json: bool,
    output: Path | None,
    match: str,
    **numbers: int,
) -> None:
    """Measure the cost of quantization on your own text: quality, memory and speed of each, and which to choose.

    Measures perplexity, the KL divergence of next-token distributions from the baseline's, how many greedy answers stay
    the same, accuracy if the data has answers, memory, and tokens per second of batchmill's own engine. Only one model
    is in memory at a time. The exit code is 5 if some could not be measured, 1 if none could.
    """
    settings = load_settings()
    _prepare_process(settings, device)
    from batchmill.worker.evaluate.data.corpus import Corpus
    from batchmill.worker.evaluate.lineup import Lineup
    from batchmill.worker.evaluate.measures.accuracy import Match, check_answers
    from batchmill.worker.evaluate.report.chart import check, draw

    lineup = Lineup.parse(model, quantizations or (settings.quantization,), baseline=baseline, revision=revision)
    refuse_slip(lineup.baseline)
    keep = [data, *settings.files]
    check_target(None, keep=keep)
    if output is not None:
        check(output, keep=keep)
    corpus = Corpus.read(data, tokens=numbers["tokens"])
    check_answers(corpus, Match(match))
    if find_spec("torch") is None:
        raise ModelError("torch is not installed here: pip install 'batchmill[worker]'")
    from batchmill.worker.evaluate.evaluation import Asked
    from batchmill.worker.evaluate.report.report import lines, to_json

    report = _report(lineup, corpus, Asked(match=Match(match), **numbers), _device(device, share_device), settings)
    click.echo(json.dumps(to_json(report)) if as_json else "\n".join(lines(report)))
    if not report.measured:
        raise ModelError("nothing could be measured; the lines above say why")
    if output is not None:
        draw(report, output)
        click.echo(f"the chart is in {output}", err=True)
    if report.failed:
        rows = counted(len(report.rows), "quantization")
        raise NotAllSucceeded(f"{len(report.failed)} of {rows} could not be measured")


def _prepare_process(settings: Settings, device: str) -> None:
    """Prepares the process before torch is loaded; progress is shown, so that logs tell of trouble alone."""
    level = "warning" if settings.log_level == "info" else settings.log_level
    configure_logs(level=level, form=settings.log_format)
    os.environ["CUDA_VISIBLE_DEVICES"] = visible_devices([device], os.environ)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in a worker


def _device(written: str, share_device: bool) -> DeviceInfo:
    (device,) = describe_devices([written])
    if device.uuid is not None and not share_device:
        DeviceLock(device.uuid).take()
    use_all_cores()
    return device


def _report(lineup: Lineup, corpus: Corpus, asked: Asked, device: DeviceInfo, settings: Settings) -> Report:
    """Measures, and keeps each row in the store as soon as it is there."""
    from batchmill.worker.evaluate.evaluation import Evaluation
    from batchmill.worker.evaluate.measures.measurement import Report
    from batchmill.worker.evaluate.progress import ProgressBar

    store, used_versions = open_store(settings), versions()

    def keep(row: Measurement, method: Method, reference: Measurement | None) -> None:
        try:
            store.evaluations.add(
                row.spec,
                identity=row.identity,
                baseline=None if reference is None else reference.spec,
                data=DataFile(corpus.name, corpus.sha256),
                device_name=device.name,
                measured={
                    **row.to_json(),
                    "baseline_perplexity": None if reference is None else reference.perplexity,
                    "method": method.to_json(),
                },
                versions=used_versions,
            )
        except StoreError as error:
            shown.say(f"what was measured of {row.spec} is not kept: {error}")

    with closing(store), ProgressBar(len(lineup.specs)) as shown:
        options = EngineOptions.of(settings)
        digests = Digests(settings.home)
        evaluation = Evaluation(
            lineup, corpus, asked, device=device, options=options, digests=digests, shown=shown, keep=keep
        )
        rows = evaluation.run()
    return Report(lineup.baseline, corpus.name, corpus.sha256, device.name, evaluation.method, rows, used_versions)
