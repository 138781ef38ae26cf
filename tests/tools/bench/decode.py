"""`python -m tests.tools.bench decode`: how near to the floor rows decode on a GPU, beside transformers.

Owns the command, and what is measured first: the largest model in 4 bits, at the rows that matter most; the engine
alone before the peers. Tables go to stdout as they are ready, with one of everything last; what happens to stderr.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from batchmill.jobs.errors import UsageError
from batchmill.jobs.models.quantization import Quantization
from batchmill.worker.devices.selection import visible_devices
from batchmill.worker.engine.continuous.attention.flash import PAGE_TOKENS
from batchmill.worker.plan.hardware import Hardware
from tests.tools.bench import report
from tests.tools.bench.contest import in_process
from tests.tools.bench.contestant import Contestant, ContestantError, Setup
from tests.tools.bench.decoders import EngineDecoder, GenerateBatchDecoder, GenerateDecoder
from tests.tools.bench.floor import Floor, floors, hardware_of, rates_text
from tests.tools.bench.lineup import root_folder, some_of
from tests.tools.bench.score import Ground, Score, table
from tests.tools.bench.turns import Clock, Plan, Turns

T = TypeVar("T")
PEERS: dict[str, type[Contestant]] = {"generate": GenerateDecoder, "generate_batch": GenerateBatchDecoder}
#: In the order of measurement; models that were not asked for are skipped.
MODELS = ("8b", "1b", "250m", "45m", "demo")
QUANTIZATIONS = ("nf4", "none", "int8:threshold=0", "int8")
ROWS = (64, 256, 16, 1)
PEERS_ROWS = (64, 1)


@dataclass(slots=True)
class Bench:
    """The flags of one benchmark and its scores so far."""

    chosen: argparse.Namespace
    plan: Plan
    clock: Clock
    root: Path
    ground: Ground
    folders: dict[str, Path] = field(default_factory=dict)
    floors: dict[tuple[str, str], Floor] = field(default_factory=dict)
    scores: list[Score] = field(default_factory=list)

    def measure(self, kinds: Sequence[type[Contestant]], model: str, rows: Sequence[int]) -> None:
        """A table of each quantization of a model."""
        if not self._made(kinds, model, rows):
            return
        for quantization in map(str, self.chosen.quantizations):
            turns = Turns(
                self.folders[model],
                model,
                quantization,
                setup=self._setup(max(rows)),
                plan=self.plan,
                floor=self.floors.get((model, quantization)),
                clock=self.clock,
            )
            with closing(turns):
                found = [score for count in rows for score in turns.measure(kinds, count)]
            self.scores += found
            print(f"### {model}, {quantization}\n{table(found, self.ground)}", flush=True)

    def _made(self, kinds: Sequence[type[Contestant]], model: str, rows: Sequence[int]) -> bool:
        """True where the model is there; if not, its scores say why."""
        if model in self.folders or self.clock.up:
            return model in self.folders
        try:
            arguments = self.root, model, self.chosen.device, self.chosen.quantizations
            self.folders[model], found = in_process(_checkpoint, *arguments)
            self.floors |= {(model, quantization): floor for quantization, floor in found.items()}
            return True
        except ContestantError as error:
            self.scores.append(Score(model, "", max(rows), kinds[0].name, failed=str(error)))
            return False

    def _setup(self, rows: int) -> Setup:
        """Room for whole slots, and for a quarter more rows: the engine keeps a part of its cache free."""
        context = -(-self.plan.most_tokens // PAGE_TOKENS) * PAGE_TOKENS
        return Setup(self.chosen.device, rows + rows // 4 + 2, context, self.chosen.dequantize)


def main(words: Sequence[str]) -> None:
    chosen = _arguments(words)
    chosen.device = _only(chosen.device)
    plan = Plan(chosen.context, chosen.answers, chosen.rounds, chosen.threads)
    clock = Clock(chosen.seconds)
    print(report.heading(chosen.threads))
    with root_folder(chosen.folder) as root:
        try:
            sheet, measured = in_process(_hardware, chosen.device, chosen.threads)
        except ContestantError as error:
            raise SystemExit(f"bench: {chosen.device}: {error}") from error
        ground = Ground(sheet, measured if chosen.device != "cpu" else sheet, plan.context_tokens)
        print("\n".join(_preamble(ground, plan)), flush=True)
        bench = Bench(chosen, plan, clock, root, ground)
        for kinds, model, rows in _order(chosen):
            bench.measure(kinds, model, rows)
    print("### all of it\n" + table(bench.scores, ground) if bench.scores else "nothing was measured")


def _order(chosen: argparse.Namespace) -> Iterator[tuple[list[type[Contestant]], str, list[int]]]:
    for model in chosen.models if not chosen.only_peers else []:
        yield [EngineDecoder], model, chosen.rows
    peers = [PEERS[name] for name in chosen.peers]
    rows = [each for each in PEERS_ROWS if each in chosen.rows] or chosen.rows[:1]
    for model in chosen.models if peers else []:
        yield [EngineDecoder, *peers], model, rows


def _preamble(ground: Ground, plan: Plan) -> Iterator[str]:
    for each in {id(each): each for each in (ground.sheet, ground.measured)}.values():
        yield rates_text(each)
    yield (
        f"rows of {plan.prompt_tokens:,} prompt and {plan.answer_tokens:,} answer tokens, {plan.context_tokens:,} "
        f"on average while they decode; {plan.rounds} rounds, medians; the floor by the rates measured here"
    )
    yield "decoding: from the last row's first token to the first row's last; prefill: up to the last row's first token"
    yield "continuous decodes rows whose prompts share a beginning, which each copies; what it reads shares nothing"
    yield ""


def _only(device: str) -> str:
    """Shows this process and those that it starts one device alone, and says what that is called then."""
    try:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible_devices([device], os.environ)
    except UsageError as error:
        raise SystemExit(f"bench: {error}") from error
    return device if device == "cpu" else "cuda:0"


def _hardware(device: str, threads: int) -> tuple[Hardware, Hardware]:
    import torch

    torch.set_num_threads(threads)
    return hardware_of(device)


def _checkpoint(
    root: Path, model: str, device: str, quantizations: Sequence[Quantization]
) -> tuple[Path, dict[str, Floor]]:
    from tests.tools.bench.models import checkpoint

    print(f"making or finding {model}", file=sys.stderr, flush=True)
    folder = checkpoint(root, model, device=device)
    return folder, floors(folder, quantizations, device)


def _arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.tools.bench decode", description=__doc__)
    parser.add_argument("--device", default="cuda:0", help="cuda:N, a GPU's UUID or cpu (default: cuda:0)")
    parser.add_argument("--models", type=some_of(MODELS), default=["8b", "1b"], help=", ".join(MODELS))
    parser.add_argument(
        "--quantizations",
        type=_quantizations,
        default=",".join(QUANTIZATIONS),
        help=f"as -q: {', '.join(QUANTIZATIONS)}",
    )
    parser.add_argument("--rows", type=_rows, default="64,256,16,1", help="how many decode at once: 64,256,16,1")
    parser.add_argument("--context", type=int, default=1024, help="mean tokens of a row while it decodes")
    parser.add_argument("--answers", type=int, default=64, help="tokens of each answer, 2 at least")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--dequantize", choices=("auto", "never", "always"), default="auto", help="as the worker's flag"
    )
    parser.add_argument(
        "--peers", type=some_of(PEERS), nargs="?", const=list(PEERS), default=[], help=f"all, or {', '.join(PEERS)}"
    )
    parser.add_argument("--only-peers", action="store_true", help="leaves out the first part, the engine alone")
    parser.add_argument("--seconds", type=float, help="begins no measurement after so many, and prints what there is")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--folder", type=Path, help="keeps the models there, for the next time")
    chosen = parser.parse_args(words)
    if chosen.answers < 2 or chosen.context <= chosen.answers:
        parser.error("answers have 2 tokens at least, and a context has more than they")
    chosen.models = _by_importance(chosen.models, MODELS)
    return chosen


def _quantizations(text: str) -> list[Quantization]:
    """Separated by commas, between which an option may have some of its own: nf4,int8:threshold=0."""
    spelled: list[str] = []
    for part in text.split(","):
        if "=" in part and ":" not in part and spelled:
            spelled[-1] += f",{part}"
        else:
            spelled.append(part)
    try:
        found = [Quantization.parse(each) for each in spelled]
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return [Quantization.parse(each) for each in _by_importance(list(map(str, found)), QUANTIZATIONS)]


def _rows(text: str) -> list[int]:
    try:
        found = [int(each) for each in text.split(",")]
    except ValueError:
        found = [0]
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text}: write numbers of rows, such as 64,1")
    return _by_importance(found, ROWS)


def _by_importance(asked: Sequence[T], known: Sequence[T]) -> list[T]:
    return sorted(asked, key=lambda each: known.index(each) if each in known else len(known))
