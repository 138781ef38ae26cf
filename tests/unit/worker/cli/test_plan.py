"""`batchmill plan` as a user runs it: its table, its JSON, and models that cannot be planned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from batchmill.jobs.models.spec import DEMO, DEMO_FOLDER
from batchmill.worker.cli import plan as cli_plan

GIB = 1024**3


def plan(*arguments: str) -> str:
    done = CliRunner().invoke(cli_plan.main, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BATCHMILL_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_the_command_shows_a_table_and_ends_with_what_to_take(home: Path) -> None:
    said = plan(DEMO, "--devices", "cpu", "--context", "64").splitlines()
    table = [line.split() for line in said if line.startswith("  ")]
    assert [row[0] for row in table[1:]] == [
        "none", "none:dtype=bfloat16", "int8", "nf4:double_quant=false", "nf4", "fp4"
    ]  # fmt: skip
    assert said[-1].startswith("Take ")
    assert " -m demo -q " in said[-1]
    assert said[-1].endswith("--device cpu --context 64")
    assert not home.exists(), "no store is made by looking for one"


def test_the_command_answers_in_json(home: Path) -> None:
    shown = json.loads(plan(DEMO, "--gpu-memory", "24GiB", "--rows", "8", "--json"))
    assert (shown["model"], shown["rows"], shown["row_tokens"]) == (DEMO, 8, 512)
    (device,) = shown["devices"]
    assert (device["pretended"], device["total_bytes"], device["bytes_per_second"]) == (True, 24 * GIB, None)
    plain = device["quantizations"][0]
    assert (plain["quantization"], plain["rows"], plain["fits"]) == ("none", 8, True)
    assert (
        plain["total_bytes"] == plain["weights_bytes"] + plain["buffers_bytes"] + 8 * 512 * plain["cache_token_bytes"]
    )
    assert plain["recorded_tokens_per_second"] is None
    assert shown["take"] == {"device": "a GPU of 24.0 GiB", "quantization": "none", "command": shown["take"]["command"]}
    assert shown["take"]["command"] == "batchmill worker -m demo -q none"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["echo"], "batchmill: echo holds no weights, so there is nothing to plan"),
        ([DEMO, "--devices", "97"], "torch sees no cuda:97 here"),
        ([DEMO, "--gpu-memory", "24"], "'24' is no size of memory; write it with its unit, such as 24GiB"),
        ([DEMO, "--gpu-memory", "24GiB", "--devices", "cpu"], "leave one of them out"),
        (["/nowhere/at-all"], "there is no folder '/nowhere/at-all' here"),
    ],
)
def test_what_cannot_be_planned_is_one_line(arguments: list[str], said: str, home: Path) -> None:
    done = CliRunner().invoke(cli_plan.main, arguments)
    assert (done.exit_code, "Traceback" in done.output) == (2, False)
    assert said in done.output


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "unheard_of"}, "does not know its architecture; install a newer one"),
        ({"model_type": "unheard_of", "auto_map": {"AutoConfig": "own.Config"}}, "code of its own, which is never run"),
        ({"_attn_implementation": "some-org/some-kernel"}, "it can name code to fetch and run, which is never done"),
        ({"model_type": "vit"}, "choose a causal language model"),
    ],
)
def test_a_configuration_is_looked_over_first(changes: dict[str, Any], said: str, tmp_path: Path, home: Path) -> None:
    written = json.loads((DEMO_FOLDER / "config.json").read_text()) | changes
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(written))
    done = CliRunner().invoke(cli_plan.main, [str(tmp_path / "model"), "--gpu-memory", "1GiB"])
    assert done.exit_code == 1
    assert said in done.output
    assert len(done.output.strip().splitlines()) == 1
