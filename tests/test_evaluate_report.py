"""Agreement, accuracy, which specs are compared, and what is said of the figures: by cases made by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from jobs.errors import UsageError, WriteFailed
from jobs.quantization import Quantization
from jobs.spec import ModelSpec
from worker.evaluate.accuracy import Accuracy, Match, accuracy
from worker.evaluate.advice import advice
from worker.evaluate.agreement import Agreement, agreement
from worker.evaluate.chart import check, draw
from worker.evaluate.divergence import Divergence
from worker.evaluate.lineup import Lineup, split
from worker.evaluate.measurement import Failure, Measurement, Method, Report
from worker.evaluate.report import lines, to_json

ROOT = Path(__file__).parent.parent


def spec(quantization: str) -> ModelSpec:
    return ModelSpec("demo", None, Quantization.parse(quantization))


def row(quantization: str, **given: Any) -> Measurement:
    plain = Measurement(
        spec(quantization),
        perplexity=8.0,
        divergence=None,
        agreement=None,
        accuracy=None,
        weights_bytes=1_000_000,
        peak_bytes=2_000_000,
        tokens_per_second=100.0,
        load_seconds=1.25,
        engine="continuous",
        commit=None,
        identity="weights=1",
    )
    return replace(plain, **given)


NONE = row("none", weights_bytes=4_000_000, accuracy=Accuracy(90, 100))
METHOD = Method(2_048, 1_024, 50_000, 49, 10_000, 64, 32, "exact")


def report(*rows: Measurement | Failure, method: Method | None = METHOD) -> Report:
    return Report(spec("none"), "held-out.txt", "0" * 64, "cpu", method, rows, {"batchmill": "1"})


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("nf4", ["nf4"]),
        ("nf4,int8,none", ["nf4", "int8", "none"]),
        (
            "nf4,int8:threshold=0,nf4:compute_dtype=float16,double_quant=false,none",
            ["nf4", "int8:threshold=0", "nf4:compute_dtype=float16,double_quant=false", "none"],
        ),
        ("nf4:skip_modules=lm_head+model.layers.0,fp4", ["nf4:skip_modules=lm_head+model.layers.0", "fp4"]),
    ],
)
def test_options_with_commas_stay_with_their_quantization(text: str, parts: list[str]) -> None:
    assert list(split(text)) == parts


def test_each_spec_is_compared_once_and_the_baseline_measured_first() -> None:
    lineup = Lineup.parse("demo", ["nf4,nf4:double_quant=true", "int8"], baseline="none")
    assert [str(each.quantization) for each in lineup.specs] == ["nf4", "int8", "none"]
    assert [str(each.quantization) for each in lineup.order] == ["none", "nf4", "int8"]
    assert Lineup.parse("demo", ["none,nf4"], baseline="none").specs == (spec("none"), spec("nf4"))


@pytest.mark.parametrize(
    ("model", "text", "said"),
    [
        ("demo", "nf4,nf5", "unknown quantization 'nf5'"),
        ("demo", "nf4,,int8", "unknown quantization ''"),
        ("demo", "threshold=0", "unknown quantization 'threshold=0'"),
        ("demo", "nf4:threshold=0", "nf4 takes no threshold"),
        ("echo", "none", "echo holds no weights"),
    ],
)
def test_what_cannot_be_compared_is_refused_by_name(model: str, text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Lineup.parse(model, [text], baseline="none")


@pytest.mark.parametrize(
    ("baseline", "found", "expected"),
    [
        ([[1, 2, 3, 4]], [[1, 2, 3, 4]], Agreement(1.0, 1, 1)),
        ([[1, 2, 3, 4]], [[1, 9, 3, 4]], Agreement(0.25, 0, 1)),
        ([[1, 2]], [[1, 2, 3, 4]], Agreement(0.5, 0, 1)),
        ([[1, 2], [5, 6, 7]], [[1, 2], []], Agreement(0.4, 1, 2)),
        ([[]], [[]], Agreement(1.0, 1, 1)),
        ([], [], None),
    ],
)
def test_answers_agree_up_to_the_first_other_token(
    baseline: list[list[int]], found: list[list[int]], expected: Agreement | None
) -> None:
    assert agreement(baseline, found) == expected


def test_an_answer_is_right_if_it_is_equal_or_found() -> None:
    said = [" 85\n", "The answer is 85.", "86", "anything"]
    assert accuracy(said, ["85", "85", "85", None], Match.EXACT) == Accuracy(1, 3)
    assert accuracy(said, ["85", r"is (85|86)\.$", "^8[57]$", None], Match.REGEX) == Accuracy(2, 3)
    assert accuracy(["a"], [None], Match.EXACT) is None


def test_the_smallest_that_loses_little_is_taken() -> None:
    nf4 = row("nf4", perplexity=8.2, accuracy=Accuracy(89, 100), tokens_per_second=150.0)
    int8 = row("int8", weights_bytes=2_000_000, accuracy=Accuracy(90, 100), tokens_per_second=50.0)
    said = advice(report(nf4, int8, NONE))
    assert said == (
        "Take nf4: its weights take 976.6 KiB instead of 3.8 MiB, and it loses little against none: perplexity +2.5%, "
        "89 of 100 answers are right (90 with it), and it generates 1.5 times as fast."
    )


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"perplexity": 8.5}, "nf4: perplexity +6.2%"),
        ({"divergence": Divergence(0.25, 1.0, 10)}, "nf4: mean KL 0.25"),
        ({"accuracy": Accuracy(87, 100)}, "nf4: 87 of 100 answers right"),
    ],
)
def test_one_that_loses_much_in_any_respect_is_not_taken(given: dict[str, Any], said: str) -> None:
    expected = f"Take none: all that is smaller loses much against it ({said})."
    assert advice(report(row("nf4", **given), NONE)) == expected


def test_of_two_that_are_as_small_the_better_is_taken_and_speed_is_told() -> None:
    fp4 = row("fp4", divergence=Divergence(0.03, 1.0, 10), tokens_per_second=110.0)
    nf4 = row("nf4", divergence=Divergence(0.01, 1.0, 10), perplexity=8.1)
    fast = replace(NONE, tokens_per_second=300.0)
    said = advice(report(fp4, nf4, fast))
    assert said.startswith("Take nf4: ")
    assert said.endswith(
        "and it generates at 33% of the speed. Where its 3.8 MiB fit, none generates 3.0 times as fast as nf4."
    )


def test_of_one_as_small_that_is_much_faster_the_speed_alone_is_told() -> None:
    fp4 = row("fp4", divergence=Divergence(0.03, 1.0, 10), tokens_per_second=140.0)
    nf4 = row("nf4", divergence=Divergence(0.01, 1.0, 10))
    assert advice(report(fp4, nf4, NONE)).endswith("and it generates as fast. fp4 generates 1.4 times as fast as nf4.")


def test_little_is_advised_from_little() -> None:
    assert advice(report(Failure(spec("none"), "it broke"), method=None)) == "Nothing could be measured."
    only = report(row("nf4"), Failure(spec("none"), "it broke"))
    assert advice(only) == "Only nf4 could be measured: there is nothing to compare it with."
    few = report(row("nf4"), NONE, method=replace(METHOD, tokens=300))
    assert "Only 300 tokens were measured" in advice(few)
    assert advice(report(row("int8", weights_bytes=5_000_000), NONE)).startswith("Take none: nothing that was")


def test_without_a_baseline_the_lowest_perplexity_is_the_measure() -> None:
    said = advice(report(row("nf4", perplexity=9.0), row("int8", weights_bytes=2_000_000), Failure(spec("none"), "x")))
    assert said == "Take int8: all that is smaller loses much against it (nf4: perplexity +12.5%)."


def test_the_table_shows_what_was_measured_and_why_the_rest_was_not() -> None:
    nf4 = row("nf4", divergence=Divergence(0.0123, 0.4, 9), agreement=Agreement(0.985, 60, 64), perplexity=1234.5)
    table = lines(report(nf4, Failure(spec("int8"), "it has no room"), NONE))
    assert table[:4] == [
        "quantization     perplexity  KL mean  KL p99  same tokens   right    weights     peak  tokens/s   load",
        "nf4              1,234.5000    0.012     0.4        98.5%       -  976.6 KiB  1.9 MiB       100  1.2 s",
        "none (baseline)      8.0000        -       -            -  90/100    3.8 MiB  1.9 MiB       100  1.2 s",
        "int8: not measured: it has no room",
    ]
    text = "\n".join(table)
    assert "50,000 tokens in 49 windows of at most 2,048 tokens, stride 1,024" in text
    assert "at 10,000 of them" in text
    assert "of 64 greedy answers of at most 32 tokens" in text


def test_columns_without_figures_are_left_out() -> None:
    table = lines(report(replace(NONE, accuracy=None, tokens_per_second=None)))
    assert table[0].split() == ["quantization", "perplexity", "weights", "peak", "load"]


def test_the_json_of_a_failure_has_the_keys_of_a_measurement() -> None:
    found = to_json(report(NONE, Failure(spec("nf4"), "it broke")))
    measured, failed = found["results"]
    assert list(measured) == list(failed)
    assert failed["error"] == "it broke"
    assert {each for key, each in failed.items() if key not in ("quantization", "error")} == {None}
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_the_chart_names_every_row(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"chart.{ending}"
    check(path, keep=[])
    draw(report(row("nf4"), replace(NONE, tokens_per_second=None)), path)
    raw = path.read_bytes()
    if ending == "png":
        assert raw.startswith(b"\x89PNG")
    else:
        assert ElementTree.fromstring(raw).tag.endswith("svg")
        said = raw.decode()
        assert "<!-- nf4 -->" in said
        assert "<!-- none (90% right) -->" in said


def test_a_matplotlibrc_of_the_current_folder_draws_nothing(tmp_path: Path) -> None:
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\ntext.latex.preamble: \\\\input{secret}\n")
    code = (
        "import pathlib, tests.test_evaluate_report as own\n"
        "own.draw(own.report(own.NONE), pathlib.Path('chart.png'))\n"
        "import matplotlib; print(matplotlib.rcParams['text.usetex'])"
    )
    environ = os.environ | {"PYTHONPATH": str(ROOT), "MPLCONFIGDIR": str(tmp_path / "config")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert done.stdout == "True\n", f"matplotlib has read it: {done.stderr}"
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["chart.pdf", "chart", "no-folder/chart.png"])
def test_a_chart_that_could_not_be_written_is_refused_before(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="-o "):
        check(tmp_path / name, keep=[])


def test_a_chart_over_a_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "chart.png").mkdir()
    with pytest.raises(UsageError, match="is a folder"):
        check(tmp_path / "chart.png", keep=[])
    with pytest.raises(WriteFailed, match="cannot write"):
        draw(report(NONE), tmp_path / "chart.png")
