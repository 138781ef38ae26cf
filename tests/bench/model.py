"""The engine and the whole line against transformers' `generate`, with one model and the same requests."""

from __future__ import annotations

import json
import random
import re
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from jobs.schema import Request, RequestKey, SamplingParams
from jobs.spec import ModelSpec
from tests.bench.mill import command, home
from tests.bench.table import Row
from worker.engine.generate import GenerateEngine
from worker.loader import DEMO_FOLDER, LoadedModel, load

_REQUESTS = 256
_ROWS = 16
_SEED = 7


def engine(_lines: int) -> list[Row]:
    """A Llama of about 45 million random weights in NF4, with prompts of 8-128 and answers of 8-64 tokens."""
    with home() as folder:
        spec = ModelSpec.parse(str(random_model(folder / "model")))
        requests = workload()
        loaded = load(spec, "cpu")
        one_by_one = _rate(loaded, requests[:16], _generate_one_by_one)
        sorted_batches = _rate(loaded, requests, _generate_sorted)
        engine_alone = _rate(loaded, requests, _engine)
        del loaded
        whole_line, store_share = _whole_line(folder, spec, requests)
    return [
        Row("generate, one by one, nf4", f"{one_by_one:,.0f} tokens/s"),
        Row(f"generate, length-sorted batches of {_ROWS}", f"{sorted_batches:,.0f} tokens/s"),
        Row("batchmill's first engine alone", f"{engine_alone:,.0f} tokens/s"),
        Row("batchmill, the whole line", f"{whole_line:,.0f} tokens/s"),
        Row("ratio to one by one", f"{whole_line / one_by_one:.2f}"),
        Row("ratio to length-sorted", f"{whole_line / sorted_batches:.2f}"),
        Row("outside the engine, of the time of that run", f"{store_share:.1%}", "under 2 %"),
    ]


def random_model(folder: Path) -> Path:
    """About 45 million random weights, with the demo model's tokenizer."""
    torch.manual_seed(_SEED)
    shutil.copytree(DEMO_FOLDER, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    vocabulary = json.loads((DEMO_FOLDER / "config.json").read_text())["vocab_size"]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=640,
        intermediate_size=1792,
        num_hidden_layers=9,
        num_attention_heads=10,
        num_key_value_heads=5,
        max_position_embeddings=512,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def workload() -> list[Request]:
    """Heavy-tailed lengths: most prompts and answers are short, some are long."""
    lengths = random.Random(_SEED)
    requests = []
    for index in range(_REQUESTS):
        prompt_tokens = min(128, int(8 * lengths.paretovariate(0.9)))
        answer_tokens = min(64, int(8 * lengths.paretovariate(0.9)))
        sampling = SamplingParams(max_tokens=answer_tokens, temperature=0.0)
        requests.append(Request(index, f"r{index}", prompt="x" * (prompt_tokens - 1), sampling=sampling))
    return requests


def _rate(
    loaded: LoadedModel, requests: Sequence[Request], run: Callable[[LoadedModel, Sequence[Request]], int]
) -> float:
    """Generated tokens per second, after a warm-up."""
    run(loaded, requests[:2])
    begin = perf_counter()
    tokens = run(loaded, requests)
    return tokens / (perf_counter() - begin)


def _generate_one_by_one(loaded: LoadedModel, requests: Sequence[Request]) -> int:
    return sum(_generate(loaded, [request]) for request in requests)


def _generate_sorted(loaded: LoadedModel, requests: Sequence[Request]) -> int:
    ordered = sorted(requests, key=lambda each: len(each.prompt or ""))
    return sum(_generate(loaded, ordered[begin : begin + _ROWS]) for begin in range(0, len(ordered), _ROWS))


def _generate(loaded: LoadedModel, requests: Sequence[Request]) -> int:
    """A plain call of `generate`: the useful tokens, which are those that each request asked for."""
    tokenizer = loaded.tokenizer
    batch = tokenizer([each.prompt or "" for each in requests], return_tensors="pt", padding=True, padding_side="left")
    asked = [each.sampling.max_tokens or 0 for each in requests]
    found = loaded.model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=max(asked),
        do_sample=False,
        eos_token_id=list(loaded.end_token_ids),
        pad_token_id=loaded.pad_token_id,
    )[:, batch["input_ids"].shape[1] :]
    return sum(_useful(row[:most], loaded) for row, most in zip(found.tolist(), asked, strict=True))


def _useful(row: list[int], loaded: LoadedModel) -> int:
    ends = [place for place, token in enumerate(row) if token in loaded.end_token_ids]
    return ends[0] + 1 if ends else len(row)


def _engine(loaded: LoadedModel, requests: Sequence[Request]) -> int:
    """The engine fed as the runner feeds it: a quarter more requests wait than it has rows."""
    engine = GenerateEngine(loaded)
    ahead = deque(requests)
    tokens = 0
    while ahead or engine.waiting:
        while ahead and engine.waiting < engine.rows + engine.rows // 4:
            request = ahead.popleft()
            engine.add(RequestKey("bench", request.index), request)
        tokens += sum(output.completion_tokens for output in engine.step())
    return tokens


def _whole_line(folder: Path, spec: ModelSpec, requests: Sequence[Request]) -> tuple[float, float]:
    """Completion tokens per second of `batchmill run`, and the share of its time that the engine was not at work."""
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": each.prompt, **each.sampling.to_json()}) + "\n" for each in requests))
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        command(folder, "run", file, "-m", spec.model, "-o", folder / "answers.jsonl")
        command(folder, "status", "last", "--json", stdout=out.name)
        status = json.loads(Path(out.name).read_text())
    in_steps = float(re.findall(r"in_steps_share=([0-9.]+)", (folder / "worker.log").read_text())[0])
    return status["throughput"]["completion_tokens_per_second"], 1 - in_steps
