"""`make bench-engine`: batchmill's engines and what users could pick instead, on the same weights and requests.

Owns the command and who may take part. Tables go to stdout, what happens meanwhile to stderr.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from tests.tools.bench import report
from tests.tools.bench.agreement import Agreement
from tests.tools.bench.contest import Contest, Kind, in_process
from tests.tools.bench.engines import AtOnceContestant, ContinuousContestant, GenerateContestant, UnsharedContestant
from tests.tools.bench.peers.ctranslate2 import CTranslate2, OneLimitCTranslate2, UntunedCTranslate2
from tests.tools.bench.peers.llama import LlamaCpp
from tests.tools.bench.peers.transformers import (
    AnswerSortedGenerate,
    GenerateBatch,
    OneByOneGenerate,
    SortedGenerate,
    UntunedGenerateBatch,
)
from tests.tools.bench.workloads import PLANS, Workload, workload

ENGINES: dict[str, Kind] = {
    "continuous": ContinuousContestant,
    "unshared": UnsharedContestant,
    "at-once": AtOnceContestant,
    "generate": GenerateContestant,
}
PEERS: dict[str, Kind] = {
    "sorted": SortedGenerate,
    "answer-sorted": AnswerSortedGenerate,
    "one-by-one": OneByOneGenerate,
    "generate_batch": GenerateBatch,
    "generate_batch-untuned": UntunedGenerateBatch,
    "ctranslate2": CTranslate2,
    "ctranslate2-one-limit": OneLimitCTranslate2,
    "ctranslate2-untuned": UntunedCTranslate2,
    "llama.cpp": LlamaCpp,
}
MODELS = ("demo", "45m", "250m")
QUANTIZATIONS = ("nf4", "int8", "none")
#: Models that get fewer requests.
_LARGE = frozenset({"250m"})


def main(words: Sequence[str]) -> None:
    chosen = _arguments(words)
    print(report.heading(chosen.threads))
    with root_folder(chosen.folder) as root:
        for model in chosen.models:
            folder = in_process(_checkpoint, root, model, None if model == "demo" else chosen.vocabulary)
            if chosen.agree:
                _compare(chosen, folder, model)
                continue
            for quantization in chosen.quantizations:
                _measure(chosen, folder, model, quantization)


def _compare(chosen: argparse.Namespace, folder: Path, model: str) -> None:
    agreement = Agreement(folder, threads=chosen.threads)
    for name in chosen.workloads:
        found = agreement.of([PEERS[peer] for peer in chosen.peers], name)
        if found is not None:
            print(report.agreement(f"{model}, workload {name}", found), flush=True)


def _measure(chosen: argparse.Namespace, folder: Path, model: str, quantization: str) -> None:
    contest = Contest(folder, quantization, threads=chosen.threads, rounds=chosen.rounds)
    with closing(contest):
        for name in chosen.workloads:
            asked = workload(name, folder, large=model in _LARGE)
            if asked is None:
                print(f"### {model}, {quantization}, workload {name}\nleft out: the model's context is too short\n")
                continue
            entries = contest.measure(_kinds(chosen, asked), asked)
            print(report.table(f"{model}, {quantization}", asked, entries), flush=True)


def _kinds(chosen: argparse.Namespace, asked: Workload) -> list[Kind]:
    names = list(chosen.engine)
    if asked.shared_tokens and "continuous" in names and "unshared" not in names:
        names.append("unshared")
    return [ENGINES[name] for name in names] + [PEERS[name] for name in chosen.peers]


def _arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.tools.bench engine", description=__doc__)
    parser.add_argument("--models", type=some_of(MODELS), default=["45m", "250m"], help=", ".join(MODELS))
    parser.add_argument("--workloads", type=some_of(PLANS), default=["a", "b"], help=", ".join(PLANS))
    parser.add_argument("--quantizations", type=some_of(QUANTIZATIONS), default=["nf4"], help=", ".join(QUANTIZATIONS))
    parser.add_argument(
        "--engine", type=some_of(ENGINES), default=["continuous"], help=f"{', '.join(ENGINES)}; the first is compared"
    )
    parser.add_argument(
        "--peers", type=some_of(PEERS), nargs="?", const=list(PEERS), default=[], help=f"all, or {', '.join(PEERS)}"
    )
    parser.add_argument("--all", action="store_true", help="every model, workload, quantization and peer: takes hours")
    parser.add_argument("--agree", action="store_true", help="compare the peers' tokens with transformers' instead")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--vocabulary", type=int, help="tokens of the random models (default: the bundled model's)")
    parser.add_argument("--folder", type=Path, help="keeps the models there, for the next time")
    chosen = parser.parse_args(words)
    if chosen.all:
        chosen.models, chosen.workloads, chosen.quantizations = MODELS, list(PLANS), QUANTIZATIONS
        chosen.peers = list(PEERS)
    return chosen


def some_of(names: Collection[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        found = text.split(",")
        if unknown := sorted(set(found) - set(names)):
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: choose of {', '.join(names)}")
        return found

    return parse


@contextmanager
def root_folder(folder: Path | None) -> Iterator[Path]:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder.absolute()
        return
    with tempfile.TemporaryDirectory(prefix="batchmill-bench-") as made:
        yield Path(made)


def _checkpoint(root: Path, model: str, vocabulary: int | None) -> Path:
    from tests.tools.bench.models import checkpoint

    return checkpoint(root, model, vocabulary=vocabulary)
