"""The whole line against transformers' `generate`, with one model and the same requests."""

from __future__ import annotations

import json
import os
import re
import tempfile
from pathlib import Path

from tests.tools.bench.contestant import Contestant, Process
from tests.tools.bench.engines import ContinuousContestant
from tests.tools.bench.mill import command, home
from tests.tools.bench.models import checkpoint
from tests.tools.bench.peers.transformers import OneByOneGenerate, SortedGenerate
from tests.tools.bench.table import Row
from tests.tools.bench.workloads import Workload, workload


def line(_lines: int) -> list[Row]:
    """A Llama of about 45 million random weights in NF4, with prompts of 8-128 and answers of 8-64 tokens."""
    with home() as folder:
        model = checkpoint(folder, "45m")
        asked = workload("a", model, large=False)
        assert asked is not None
        one_by_one, sorted_batches, engine = (
            _rate(kind, model, asked) for kind in (OneByOneGenerate, SortedGenerate, ContinuousContestant)
        )
        whole_line, store_share = _whole_line(folder, model, asked)
    return [
        Row("generate, one by one, nf4", f"{one_by_one:,.0f} tokens/s"),
        Row("generate, length-sorted batches of 16", f"{sorted_batches:,.0f} tokens/s"),
        Row("batchmill's engine alone", f"{engine:,.0f} tokens/s"),
        Row("batchmill, the whole line", f"{whole_line:,.0f} tokens/s"),
        Row("ratio to one by one", f"{whole_line / one_by_one:.2f}"),
        Row("ratio to length-sorted", f"{whole_line / sorted_batches:.2f}"),
        Row("outside the engine, of the time of that run", f"{store_share:.1%}", "under 2 %"),
    ]


def _rate(kind: type[Contestant], model: Path, asked: Workload) -> float:
    """Generated tokens per second, after a warm-up."""
    process = Process(kind, model, "nf4", threads=os.cpu_count() or 1)
    process.tune(asked)
    measured = process.run(asked)
    process.close()
    return measured.tokens_per_second


def _whole_line(folder: Path, model: Path, asked: Workload) -> tuple[float, float]:
    """Completion tokens per second of `batchmill run`, and the share of its time that the engine was not at work."""
    file = folder / "prompts.jsonl"
    options = {"temperature": 0.0, "ignore_eos": True}
    lines = ({"prompt": ask.text, "max_tokens": ask.answer_tokens, **options} for ask in asked.asks)
    file.write_text("".join(json.dumps(each) + "\n" for each in lines))
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        command(folder, "run", file, "-m", model, "-o", folder / "answers.jsonl")
        command(folder, "status", "last", "--json", stdout=out.name)
        status = json.loads(Path(out.name).read_text())
    in_steps = float(re.findall(r"in_steps_share=([0-9.]+)", (folder / "worker.log").read_text())[-1])
    return status["throughput"]["completion_tokens_per_second"], 1 - in_steps
