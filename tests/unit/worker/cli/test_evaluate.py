"""`batchmill evaluate` as a user runs it: the demo model on its own questions, bad data, and models that fail."""

from __future__ import annotations

import gc
import json
import math
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from batchmill.jobs.configuration.settings import load_settings
from batchmill.jobs.errors import UsageError
from batchmill.jobs.models.digests import Digests
from batchmill.jobs.models.identity import of_model
from batchmill.jobs.models.spec import DEMO_FOLDER, ModelSpec
from batchmill.migrations.revisions import open_store
from batchmill.worker.demo import corpus
from batchmill.worker.devices.selection import CPU, DeviceInfo
from batchmill.worker.engine.options import EngineOptions
from batchmill.worker.evaluate.data.corpus import Corpus
from batchmill.worker.evaluate.evaluation import Asked, Evaluation
from batchmill.worker.evaluate.lineup import Lineup
from batchmill.worker.evaluate.measures.accuracy import Match
from batchmill.worker.evaluate.measures.measurement import Failure, Measurement, Method
from batchmill.worker.evaluate.measures.perplexity import PerplexityChange
from batchmill.worker.evaluate.progress import ProgressBar
from tests.support.models.tiny import save_tiny_model
from tests.support.paths import ROOT

NUMBER = {"type": "number"}
COUNT = {"type": "integer", "minimum": 0}
TEXT = {"type": "string"}


def closed(**keys: Any) -> dict[str, Any]:
    """A JSON object of exactly these keys."""
    return {"type": "object", "properties": keys, "required": list(keys), "additionalProperties": False}


def maybe(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


#: The public keys of `evaluate --json`; none may go or change its meaning.
SCHEMA = closed(
    model=TEXT,
    revision=maybe(TEXT),
    baseline=TEXT,
    data=closed(name=TEXT, sha256=TEXT),
    device=TEXT,
    method=maybe(
        closed(
            window_tokens=COUNT,
            stride_tokens=COUNT,
            tokens=COUNT,
            windows=COUNT,
            divergence_places=COUNT,
            continuations=COUNT,
            max_tokens=COUNT,
            match=TEXT,
        )
    ),
    results={
        "type": "array",
        "items": closed(
            quantization=TEXT,
            perplexity=maybe(NUMBER),
            perplexity_change=maybe(closed(nats=NUMBER, standard_error=maybe(NUMBER))),
            divergence=maybe(closed(mean=NUMBER, p99=NUMBER, places=COUNT, standard_error=maybe(NUMBER))),
            agreement=maybe(closed(share=NUMBER, identical=COUNT, answers=COUNT)),
            accuracy=maybe(closed(right=COUNT, answers=COUNT, share=NUMBER, lost=maybe(COUNT), gained=maybe(COUNT))),
            weights_bytes=maybe(COUNT),
            peak_bytes=maybe(COUNT),
            tokens_per_second=maybe(NUMBER),
            load_seconds=maybe(NUMBER),
            engine=maybe(TEXT),
            commit=maybe(TEXT),
            error=maybe(TEXT),
        ),
    },
    advice=TEXT,
    versions={"type": "object", "additionalProperties": TEXT},
)


def evaluate(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environ = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT / "src"), "BATCHMILL_HOME": str(cwd / "home")}
    environ |= {name: os.environ[name] for name in ("OMP_NUM_THREADS",) if name in os.environ}
    command = [sys.executable, "-m", "batchmill.worker", "evaluate", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environ)


def test_the_demo_model_keeps_its_answers_in_every_quantization(tmp_path: Path) -> None:
    examples = corpus.held_out_examples("addition", 20) + corpus.held_out_examples("sorting", 12)
    lines = [{"messages": [{"role": "user", "content": each.question}], "answer": each.answer} for each in examples]
    (tmp_path / "held-out.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    words = ["demo", "-q", "nf4,fp4,int8:threshold=0", "-q", "none", "--data", "held-out.jsonl", "--device", "cpu"]
    done = evaluate(*words, "--json", "-o", "chart.png", "--max-tokens", "24", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    jsonschema.validate(shown, SCHEMA)
    rows = {each["quantization"]: each for each in shown["results"]}
    assert list(rows) == ["nf4", "fp4", "int8:threshold=0", "none"]
    for each in rows.values():
        assert each["error"] is None
        assert each["accuracy"]["right"] >= 30
        assert 1.0 < each["perplexity"] < 1.2
        assert each["tokens_per_second"] > 0
    assert rows["none"]["divergence"] is None
    assert rows["nf4"]["weights_bytes"] < rows["int8:threshold=0"]["weights_bytes"] < rows["none"]["weights_bytes"]
    assert 0 < rows["nf4"]["divergence"]["mean"] < 0.1
    assert rows["nf4"]["agreement"]["share"] > 0.9
    assert shown["advice"].startswith("Take ")
    assert shown["method"]["tokens"] == sum(len(each.answer) for each in examples)
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
    assert "Traceback" not in done.stderr
    assert not any(each.question in done.stderr for each in examples)
    store = open_store(load_settings(home=tmp_path / "home"))
    kept = store.evaluations.latest(ModelSpec.parse("demo", quantization="nf4"))
    same = store.evaluations.latest(
        ModelSpec.parse("demo", quantization="nf4"), identity=of_model(DEMO_FOLDER, Digests()).identity
    )
    store.close()
    assert kept is not None
    assert kept == same
    assert kept.baseline == ModelSpec.parse("demo", quantization="none")
    assert kept.measured["perplexity"] == rows["nf4"]["perplexity"]
    assert kept.measured["baseline_perplexity"] == rows["none"]["perplexity"]
    assert kept.measured["method"] == shown["method"]
    assert kept.data.sha256 == shown["data"]["sha256"]


def test_what_is_wrong_with_data_or_chart_is_one_line_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": "secret\n')
    (tmp_path / "good.txt").write_text("fine")
    for words, said in (
        (["--data", "bad.jsonl"], "batchmill: bad.jsonl:2: is not JSON: Invalid control character at column 17\n"),
        (["--data", "good.txt", "-o", "c.pdf"], "batchmill: -o c.pdf: a chart is a .png or .svg file\n"),
    ):
        for model in (["demo"], ["-m", "demo"]):
            done = evaluate(*model, *words, cwd=tmp_path)
            assert (done.returncode, done.stdout, done.stderr) == (2, "", said)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model")))


Keep = Callable[[Measurement, Method, Measurement | None], None]


def evaluation(
    model: str,
    quantizations: str,
    data: Path,
    *,
    baseline: str = "none",
    keep: Keep = lambda *_: None,
    **asked: Any,
) -> Evaluation:
    lineup = Lineup.parse(model, [quantizations], baseline=baseline)
    given: dict[str, Any] = {"tokens": 400, "continuations": 3, "max_tokens": 4, "divergence_places": 50} | asked
    return Evaluation(
        lineup,
        Corpus.read(data, tokens=400),
        Asked(match=Match.EXACT, **given),
        device=DeviceInfo("cpu", None, 2**30, CPU),
        options=EngineOptions(),
        digests=Digests(),
        shown=ProgressBar(len(lineup.specs)),
        keep=keep,
    )


@pytest.fixture
def data(tmp_path: Path) -> Path:
    letters = random.Random(0).choices("abcdefgh ", k=1_000)
    (tmp_path / "text.txt").write_text("".join(letters))
    return tmp_path / "text.txt"


def models_alive() -> int:
    gc.collect()
    return sum(issubclass(type(each), PreTrainedModel) for each in gc.get_objects())


def test_one_model_is_in_memory_at_a_time_and_the_baseline_comes_first(model: str, data: Path) -> None:
    before, seen = models_alive(), []

    def keep(row: Measurement, method: Method, reference: Measurement | None) -> None:
        assert reference is not None
        assert reference.spec.quantization.canonical == "none"
        seen.append((row.spec.quantization.canonical, models_alive() - before))

    rows = evaluation(model, "nf4,int8", data, keep=keep).run()
    assert [row.spec.quantization.canonical for row in rows] == ["nf4", "int8", "none"]
    assert seen == [("none", 0), ("nf4", 0), ("int8", 0)]


def test_all_specs_are_measured_on_the_same_tokens(model: str, data: Path) -> None:
    comparison = evaluation(model, "none,none:dtype=float32", data, window_tokens=64, stride_tokens=16)
    [baseline, same] = comparison.run()
    assert isinstance(baseline, Measurement)
    assert isinstance(same, Measurement)
    assert comparison.method == Method(64, 16, 400, 23, 50, 3, 4, "exact")
    assert same.perplexity == baseline.perplexity
    assert same.divergence is not None
    assert (same.divergence.mean, same.divergence.places, same.divergence.standard_error) == (0.0, 50, 0.0)
    assert (same.perplexity_change, baseline.perplexity_change) == (PerplexityChange(0.0, 0.0), None)
    assert same.agreement is not None
    assert (same.agreement.share, same.agreement.identical) == (1.0, 3)
    assert baseline.agreement is None


def test_a_spec_that_cannot_be_loaded_is_a_row_and_the_others_go_on(model: str, data: Path) -> None:
    failed, nf4, none = evaluation(model, "checkpoint,nf4", data).run()
    assert isinstance(failed, Failure)
    assert "checkpoint" in failed.reason
    assert isinstance(nf4, Measurement)
    assert isinstance(none, Measurement)
    assert nf4.divergence is not None
    assert nf4.perplexity_change is not None
    assert math.exp(nf4.perplexity_change.nats) == pytest.approx(nf4.perplexity / none.perplexity, rel=1e-5)
    assert nf4.perplexity_change.standard_error


def test_without_the_baseline_the_others_are_measured_alone(model: str, data: Path) -> None:
    none, failed = evaluation(model, "none", data, baseline="checkpoint").run()
    assert isinstance(failed, Failure)
    assert isinstance(none, Measurement)
    assert (none.divergence, none.agreement) == (None, None)


def test_nothing_is_asked_where_no_continuations_are_wanted(model: str, data: Path) -> None:
    [none] = evaluation(model, "none", data, continuations=0, divergence_places=0).run()
    assert isinstance(none, Measurement)
    assert (none.tokens_per_second, none.engine, none.agreement) == (None, None, None)


def test_a_model_that_gives_no_numbers_is_a_row(model: str, data: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    weights = load_file(broken / "model.safetensors")
    weights["lm_head.weight"].fill_(float("nan"))
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    [failed] = evaluation(str(broken), "none", data).run()
    assert isinstance(failed, Failure)
    assert "its logits are not numbers" in failed.reason


@pytest.mark.parametrize(
    ("asked", "said"),
    [({"window_tokens": 129}, "--context 129"), ({"window_tokens": 9, "stride_tokens": 10}, "--stride")],
)
def test_windows_that_the_model_cannot_read_are_refused(
    model: str, data: Path, asked: dict[str, int], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        evaluation(model, "none", data, **asked).run()
