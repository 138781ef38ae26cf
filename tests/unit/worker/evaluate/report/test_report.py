"""Agreement, accuracy, the specs that are compared, and the advice on the figures, by cases made by hand."""

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
from hypothesis import given
from hypothesis import strategies as st

from batchmill.jobs.errors import UsageError, WriteFailed
from batchmill.jobs.models.quantization import Quantization
from batchmill.jobs.models.spec import ModelSpec
from batchmill.worker.evaluate.lineup import Lineup, split
from batchmill.worker.evaluate.measures.accuracy import Accuracy, Match, accuracy
from batchmill.worker.evaluate.measures.agreement import Agreement, agreement
from batchmill.worker.evaluate.measures.divergence import Divergence
from batchmill.worker.evaluate.measures.measurement import Failure, Measurement, Method, Report
from batchmill.worker.evaluate.measures.perplexity import PerplexityChange
from batchmill.worker.evaluate.report.advice import advice
from batchmill.worker.evaluate.report.chart import check, draw
from batchmill.worker.evaluate.report.finding import ACCURACY, AGREEMENT, DIVERGENCE, DIVERGENCE_P99, PERPLEXITY
from batchmill.worker.evaluate.report.report import lines, to_json
from tests.support.paths import ROOT


def spec(quantization: str) -> ModelSpec:
    return ModelSpec("demo", None, Quantization.parse(quantization))


def row(quantization: str, **given: Any) -> Measurement:
    plain = Measurement(
        spec(quantization),
        perplexity=8.0,
        perplexity_change=None,
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


NONE = row("none", weights_bytes=4_000_000, accuracy=Accuracy(900, 1_000))
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


def test_answers_are_compared_with_the_baselines_one_by_one() -> None:
    answers = ["1", "1", "1", "1", None]
    measured = accuracy(["1", "0", "0", "1", "x"], answers, Match.EXACT, baseline=["1", "1", "1", "0", "y"])
    assert measured == Accuracy(2, 4, lost=2, gained=1)


def test_the_smallest_that_loses_little_is_taken() -> None:
    nf4 = row(
        "nf4",
        perplexity=8.2,
        perplexity_change=PerplexityChange(0.0247, 0.001),
        divergence=Divergence(0.03, 0.4, 1_000, 0.001),
        agreement=Agreement(0.985, 60, 64),
        accuracy=Accuracy(899, 1_000, 1, 0),
        tokens_per_second=150.0,
    )
    int8 = row("int8", weights_bytes=2_000_000, accuracy=Accuracy(900, 1_000, 0, 0), tokens_per_second=50.0)
    said = advice(report(nf4, int8, NONE))
    assert said == (
        "Take nf4: its weights take 976.6 KiB instead of 3.8 MiB, and it loses little against none: perplexity +2.5%, "
        "mean KL 0.03, KL p99 0.4, same tokens 98.5% of 64 answers, 899 of 1,000 answers right (900 with it), and it "
        "generates 1.5 times as fast."
    )
    larger = replace(nf4, peak_bytes=3_000_000)
    assert ", though its peak was 2.9 MiB (1.9 MiB with none)." in advice(report(larger, NONE))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"perplexity": 8.5}, "nf4: perplexity +6.2%"),
        ({"divergence": Divergence(0.25, 1.0, 1_000, 0.05)}, "nf4: mean KL 0.25"),
        ({"divergence": Divergence(0.05, 2.0, 1_000, 0.01)}, "nf4: KL p99 2"),
        ({"accuracy": Accuracy(850, 1_000, 55, 5)}, "nf4: 850 of 1,000 answers right (900 with it)"),
    ],
)
def test_one_that_loses_much_in_any_respect_is_not_taken(given: dict[str, Any], said: str) -> None:
    expected = f"Take none: all that is smaller loses much against it ({said})."
    assert advice(report(row("nf4", **given), NONE)) == expected


def test_of_two_that_are_as_small_the_better_is_taken_and_speed_is_told() -> None:
    fp4 = row("fp4", divergence=Divergence(0.03, 1.0, 1_000, 0.001), tokens_per_second=110.0)
    nf4 = row("nf4", divergence=Divergence(0.01, 1.0, 1_000, 0.001), perplexity=8.1)
    fast = replace(NONE, tokens_per_second=300.0)
    said = advice(report(fp4, nf4, fast))
    assert said.startswith("Take nf4: ")
    assert said.endswith(
        "and it generates at 33% of the speed. Where its 3.8 MiB fit, none generates 3.0 times as fast as nf4."
    )


def test_of_one_as_small_that_is_much_faster_the_speed_alone_is_told() -> None:
    fp4 = row("fp4", divergence=Divergence(0.03, 1.0, 1_000, 0.001), tokens_per_second=140.0)
    nf4 = row("nf4", divergence=Divergence(0.01, 1.0, 1_000, 0.001))
    assert advice(report(fp4, nf4, NONE)).endswith("and it generates as fast. fp4 generates 1.4 times as fast as nf4.")


def test_what_changes_its_answers_is_not_said_to_lose_little() -> None:
    nf4 = row("nf4", perplexity=8.2, agreement=Agreement(0.5, 3, 64))
    assert advice(report(nf4, NONE)) == (
        "Take none: nothing smaller is shown to be nearly as good. nf4 may do, whose weights take 976.6 KiB "
        "instead of 3.8 MiB: little is lost by perplexity +2.5%, but its answers are others than none's (same tokens "
        "50.0% of 64 answers); take it if other wordings will do."
    )


def test_few_answers_are_too_few_to_tell() -> None:
    none = replace(NONE, accuracy=Accuracy(8, 8))
    nf4 = row("nf4", agreement=Agreement(1.0, 8, 8), accuracy=Accuracy(8, 8, 0, 0))
    assert advice(report(nf4, none)) == (
        "Take none: nothing smaller is shown to be nearly as good. nf4 may do, whose weights take 976.6 KiB "
        "instead of 3.8 MiB: little is lost by perplexity +0.0%. 8 answers are too few to tell about same tokens "
        "100.0% of 8 answers (maybe down to 74.7%), 8 of 8 answers right (8 with it; maybe up to 23.3% fewer); "
        "--continuations 128, on as many questions, would likely tell."
    )
    enough = replace(nf4, agreement=Agreement(1.0, 128, 128), accuracy=Accuracy(128, 128, 0, 0))
    assert advice(report(enough, replace(none, accuracy=Accuracy(128, 128)))).startswith("Take nf4: ")
    one = replace(nf4, accuracy=None, agreement=Agreement(1.0, 1, 1))
    assert "1 answer is too few to tell about same tokens 100.0% of 1 answer (maybe down to 27.0%)" in advice(
        report(one, none)
    )
    close = replace(nf4, accuracy=None, agreement=Agreement(0.9, 8, 8))
    assert "it is so close that more answers may not tell" in advice(report(close, none))


def test_few_tokens_are_too_few_to_tell() -> None:
    nf4 = row("nf4", perplexity_change=PerplexityChange(0.0, 0.1), divergence=Divergence(0.08, 0.5, 200, 0.05))
    said = advice(report(nf4, NONE))
    assert said.endswith(
        "The tokens that were scored are too few to tell about perplexity +0.0% (maybe up to +17.9%), mean KL "
        "0.08 (maybe up to 0.16), KL p99 0.5 (maybe more); measure more text."
    )
    single = replace(nf4, perplexity_change=PerplexityChange(0.0, None), divergence=None)
    assert "perplexity +0.0% (maybe more)" in advice(report(single, NONE))


def test_what_is_sure_is_taken_and_what_is_smaller_is_named() -> None:
    nf4 = row("nf4", agreement=Agreement(0.5, 3, 64))
    int8 = row("int8", weights_bytes=2_000_000, agreement=Agreement(1.0, 64, 64))
    said = advice(report(nf4, int8, NONE))
    assert said.startswith("Take int8: its weights take 1.9 MiB instead of 3.8 MiB, and it loses little against none: ")
    assert "nf4 may do" in said


@given(
    perplexity=st.floats(7.0, 9.0),
    error=st.floats(0.0, 0.1),
    divergence=st.builds(Divergence, st.floats(0, 0.2), st.floats(0, 2), st.integers(1, 2_000), st.floats(0, 0.1)),
    share=st.floats(0, 1),
    answers=st.integers(1, 2_000),
    right=st.floats(0, 1),
    gained=st.floats(0, 1),
)
def test_nothing_is_said_to_lose_little_beside_a_figure_that_is_much(
    perplexity: float, error: float, divergence: Divergence, share: float, answers: int, right: float, gained: float
) -> None:
    before = round(answers * 0.9)
    lost = round(before * (1 - right))
    won = round((answers - before) * gained)
    nf4 = row(
        "nf4",
        perplexity=perplexity,
        perplexity_change=PerplexityChange(0.0, error),
        divergence=divergence,
        agreement=Agreement(share, 0, answers),
        accuracy=Accuracy(before - lost + won, answers, lost, won),
    )
    said = advice(report(nf4, replace(NONE, accuracy=Accuracy(before, answers))))
    much = (
        perplexity > 8.0 * (1 + PERPLEXITY)
        or divergence.mean > DIVERGENCE
        or divergence.p99 > DIVERGENCE_P99
        or share < 1 - AGREEMENT
        or lost - won > ACCURACY * answers
        or answers < 20
        or divergence.places < 299
    )
    assert not (much and "loses little" in said), said
    assert said.startswith("Take ")


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
    nf4 = row("nf4", divergence=Divergence(0.0123, 0.4, 9, 0.01), agreement=Agreement(0.985, 60, 64), perplexity=1234.5)
    table = lines(report(nf4, Failure(spec("int8"), "it has no room"), NONE))
    assert table[:4] == [
        "quantization     perplexity  KL mean  KL p99  same tokens     right    weights     peak  tokens/s   load",
        "nf4              1,234.5000    0.012     0.4        98.5%         -  976.6 KiB  1.9 MiB       100  1.2 s",
        "none (baseline)      8.0000        -       -            -  900/1000    3.8 MiB  1.9 MiB       100  1.2 s",
        "int8: not measured: it has no room",
    ]
    text = "\n".join(table)
    assert "50,000 tokens in 49 windows of at most 2,048 tokens, stride 1,024" in text
    assert "at 10,000 of them" in text
    assert "of 64 greedy answers of at most 32 tokens" in text
    assert "Little is lost up to perplexity +5%, mean KL 0.1, KL p99 1.0, 2% of the answers fewer right, 10% of" in text


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
        "import pathlib, tests.unit.worker.evaluate.report.test_report as own\n"
        "own.draw(own.report(own.NONE), pathlib.Path('chart.png'))\n"
        "import matplotlib; print(matplotlib.rcParams['text.usetex'])"
    )
    environ = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'src'}", "MPLCONFIGDIR": str(tmp_path / "config")}
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
