"""Bytes, tokens per second and what the command says, of models that nobody has loaded."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from sqlalchemy import update
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, PreTrainedConfig

from batchmill.jobs.errors import UsageError
from batchmill.jobs.models.quantization import Quantization
from batchmill.jobs.models.spec import DEMO, DEMO_FOLDER, ModelSpec
from batchmill.jobs.runtime.sizes import bytes_of, size
from batchmill.jobs.store.store import Store
from batchmill.jobs.store.tables import runs
from batchmill.jobs.store.views.speeds import Speed
from batchmill.worker.cli import plan as cli_plan
from batchmill.worker.engine.continuous.support import cache_shape
from batchmill.worker.engine.options import EngineOptions
from batchmill.worker.models.load import load, read_model
from batchmill.worker.plan.advice import advice
from batchmill.worker.plan.hardware import Hardware, Rates, known_rates, pretended_gpu, this_cpu
from batchmill.worker.plan.model import PlannedModel
from batchmill.worker.plan.report import report
from batchmill.worker.plan.speed import Workload, tokens_per_second
from batchmill.worker.plan.table import to_lines
from tests.support.models.families import FAMILIES
from tests.support.models.tiny import build_tokenizer
from tests.support.store import mill
from tests.tools.bench.models import checkpoint

CPU = torch.device("cpu")
GPU = torch.device("cuda")
GB, GIB = 10**9, 1024**3
QUANTIZATIONS = ("none", "none:dtype=bfloat16", "int8", "nf4", "nf4:double_quant=false", "fp4")
SHAPES: Mapping[str, dict[str, Any]] = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
            "num_key_value_heads": 8},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256, "dtype": "bfloat16"},
}  # fmt: skip
#: Families whose weights are not all in linear layers of their own: tied embeddings, and experts in one tensor.
EXTRA = {
    "tied": lambda: LlamaConfig(**_TINY, tie_word_embeddings=True),
    "experts": lambda: MixtralConfig(**_TINY, num_local_experts=4),
}
_TINY = {
    "vocab_size": 260, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip


def saved(config: PreTrainedConfig, folder: Path) -> Path:
    """A model of random weights, in bfloat16."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def shape(folder: Path, name: str, **changes: Any) -> PlannedModel:
    """A configuration alone, of a size that nobody loads here."""
    LlamaConfig(**{"dtype": "float16", "max_position_embeddings": 4096} | SHAPES[name] | changes).save_pretrained(
        folder
    )
    return PlannedModel(ModelSpec(str(folder)), folder)


def scales_of(model: torch.nn.Module) -> int:
    """The bytes of scales beside quantized weights, which get_memory_footprint() leaves out."""
    found = 0
    for module in model.modules():
        weight = getattr(module, "weight", None)
        state = getattr(weight, "quant_state", None)
        if state is not None:
            nested = [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
            found += sum(each.nbytes for each in [state.absmax, state.code, *nested])
        found += getattr(getattr(weight, "SCB", None), "nbytes", 0)
    return found


def loaded_without_forward(folder: Path, quantization: str) -> Any:
    return read_model(ModelSpec(str(folder), quantization=Quantization.parse(quantization)), folder, CPU)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "mistral", "gemma2", "olmo2", "phi3", *EXTRA])
def test_every_byte_of_a_loaded_model_is_planned(family: str, tmp_path: Path) -> None:
    folder = saved((FAMILIES | EXTRA)[family](), tmp_path)
    model = PlannedModel(ModelSpec(str(folder)), folder)
    for quantization in QUANTIZATIONS:
        held = loaded_without_forward(folder, quantization)
        found = model.holding(Quantization.parse(quantization), CPU).footprint
        assert found.footprint_bytes == held.get_memory_footprint(), quantization
        assert found.scales_bytes == scales_of(held), quantization
        assert model.vocabulary == held.get_input_embeddings().num_embeddings


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_every_byte_of_a_larger_model_is_planned(quantization: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = checkpoint(tmp_path_factory.getbasetemp(), "45m")
    held = loaded_without_forward(folder, quantization)
    found = PlannedModel(ModelSpec(str(folder)), folder).holding(Quantization.parse(quantization), CPU).footprint
    assert found.footprint_bytes == held.get_memory_footprint()
    assert found.scales_bytes == scales_of(held)


@pytest.mark.parametrize("name", ["llama-grouped", "gpt2", "gemma2", "mistral"])
def test_a_tokens_cache_is_what_the_engines_measure(name: str, tmp_path: Path) -> None:
    folder = saved(FAMILIES[name](), tmp_path)
    token = PlannedModel(ModelSpec(str(folder)), folder).holding(Quantization.parse("none"), CPU).token
    loaded = load(ModelSpec(str(folder), quantization=Quantization.parse("none")), "cpu")
    assert (token.bytes, token.continuous) == (cache_shape(loaded).token_bytes, True)
    assert token.window_tokens == {"gemma2": 16, "mistral": 16}.get(name, 0)


def test_a_model_that_the_generate_engine_serves_is_measured_as_that_does(tmp_path: Path) -> None:
    config = FAMILIES["llama"]()
    config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    folder = saved(config, tmp_path)
    token = PlannedModel(ModelSpec(str(folder)), folder).holding(Quantization.parse("none"), CPU).token
    loaded = load(ModelSpec(str(folder), quantization=Quantization.parse("none")), "cpu")
    assert (token.bytes, token.continuous) == (loaded.cache_token_bytes, False)
    assert "longest row" in token.reason


@pytest.mark.parametrize(
    ("name", "quantization", "least", "most"),
    [
        ("7b", "none:dtype=float32", 26.5, 28.5),
        ("7b", "none", 13.2, 14.2),
        ("7b", "int8", 6.6, 7.2),
        ("7b", "nf4", 3.5, 4.0),
        ("70b", "none", 136, 141),
        ("70b", "int8", 68, 71),
        ("70b", "nf4", 34, 37),
    ],
)
def test_known_sizes(name: str, quantization: str, least: float, most: float, tmp_path: Path) -> None:
    found = shape(tmp_path, name).holding(Quantization.parse(quantization), GPU).footprint
    assert least <= found.weights_bytes / GB <= most


def test_double_quantization_saves_0_37_bit_a_parameter(tmp_path: Path) -> None:
    model = shape(tmp_path, "7b")
    single, double = (
        model.holding(Quantization.parse(each), GPU).footprint for each in ("nf4:double_quant=false", "nf4")
    )
    saved_bits = 8 * (single.weights_bytes - double.weights_bytes) / single.packed_parameters
    assert saved_bits == pytest.approx(0.373, abs=0.001)


def test_seventy_billion_parameters_take_seconds_and_no_memory(tmp_path: Path) -> None:
    model = shape(tmp_path, "70b")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    model.holding(Quantization.parse("nf4"), GPU)
    assert time.process_time() - began < 10, "a second on an idle machine"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024, "kilobytes"


@pytest.mark.parametrize(
    ("quantization", "rows", "copied", "expected"),
    [
        ("none", 1, False, 284),
        ("none", 16, False, 4_010),
        ("none", 64, False, 11_661),
        ("none", 256, False, 19_915),
        ("int8:threshold=0", 1, False, 527),
        ("int8:threshold=0", 16, False, 6_760),
        ("nf4", 1, False, 899),
        ("nf4", 16, False, 10_120),
        ("nf4", 64, False, 6_686),
        ("nf4", 256, False, 15_114),
        ("nf4", 64, True, 11_661),
    ],
)
def test_the_floor_of_a_step_is_that_of_known_figures(
    quantization: str, rows: int, copied: bool, expected: int, tmp_path: Path
) -> None:
    """Llama-3.1-8B on a device of 4.3 TB/s and 790 TFLOP/s, with 1,024 tokens of context, worked out by hand."""
    asked = Quantization.parse(quantization)
    holding = shape(tmp_path, "8b").holding(asked, GPU)
    gpu = Hardware("cuda:0", "", True, GIB, GIB, Rates(4.3e12, {torch.bfloat16: 790e12}, ""))
    dtype = torch.int8 if quantization.startswith("int8") else holding.dtype
    work = Workload(holding.footprint, holding.token.bytes, dtype, copied=copied)
    assert tokens_per_second(work, gpu, rows=rows, context_tokens=1024) == pytest.approx(expected, rel=0.01)


def test_the_search_for_outliers_makes_int8_slower_on_a_gpu(tmp_path: Path) -> None:
    model = shape(tmp_path, "8b")
    gpu = pretended_gpu(80 * GIB, name="NVIDIA H200")
    lines = {str(each.quantization): dict(each.speeds) for each in report(model, [gpu], EngineOptions()).devices[0][1]}
    assert lines["int8"][1] < 1.1 * lines["none"][1]


def test_rates_are_those_of_a_data_sheet_by_the_whole_name_or_not_at_all() -> None:
    assert known_rates("NVIDIA H200").bytes_per_second == 4.8e12  # type: ignore[union-attr]
    assert known_rates("NVIDIA L40S").operations_per_second[torch.bfloat16] == 362e12  # type: ignore[union-attr]
    assert known_rates("NVIDIA L40").operations_per_second[torch.bfloat16] == 181e12  # type: ignore[union-attr]
    assert known_rates("Tesla V100-SXM2-32GB").bytes_per_second == 900e9  # type: ignore[union-attr]
    assert known_rates("NVIDIA L400") is None
    assert known_rates("") is None


def test_a_cpu_is_measured_on_the_spot_in_less_than_seconds() -> None:
    began = time.process_time()
    rates = this_cpu().rates
    assert time.process_time() - began < 5, "a fraction of a second on an idle machine"
    assert rates is not None
    assert 1e8 < rates.bytes_per_second < 1e13
    assert all(1e8 < each < 1e15 for each in rates.operations_per_second.values())


@pytest.mark.parametrize("quantization", ["nf4", "nf4:double_quant=false", "int8"])
def test_a_checkpoint_that_is_quantized_already_is_planned_as_it_is_stored(quantization: str, tmp_path: Path) -> None:
    folder = saved(FAMILIES["llama"](), tmp_path / "plain")
    loaded_without_forward(folder, quantization).save_pretrained(tmp_path / "quantized")
    model = PlannedModel(ModelSpec(str(tmp_path / "quantized")), tmp_path / "quantized")
    held = loaded_without_forward(tmp_path / "quantized", "checkpoint")
    found = model.holding(Quantization.parse("checkpoint"), CPU).footprint
    assert found.footprint_bytes == pytest.approx(held.get_memory_footprint(), rel=0.02)
    assert found.weights_bytes == pytest.approx(held.get_memory_footprint() + scales_of(held), rel=0.02)
    lines = report(model, [pretended_gpu(GIB)], EngineOptions()).devices[0][1]
    assert [str(each.quantization) for each in lines] == ["checkpoint"]


def test_a_checkpoint_that_is_dequantized_while_it_is_loaded_is_planned_so(tmp_path: Path) -> None:
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    model = shape(tmp_path, "7b", quantization_config=fp8)
    found = model.holding(Quantization.parse("checkpoint"), CPU)
    assert found.footprint.weights_bytes == pytest.approx(4 * model.parameters, rel=0.001)


def test_a_configuration_alone_is_enough(tmp_path: Path) -> None:
    model = shape(tmp_path, "7b")
    assert list(tmp_path.iterdir()) == [tmp_path / "config.json"]
    said = list(to_lines(report(model, [pretended_gpu(24 * GIB)], EngineOptions()), context_asked=False))
    assert "6.74 billion parameters, 4,096 tokens of context" in said[0]


def test_a_table_in_a_narrow_terminal_has_fewer_columns(tmp_path: Path) -> None:
    found = report(shape(tmp_path, "7b"), [pretended_gpu(24 * GIB)], EngineOptions())
    rows = [each for each in to_lines(found, context_asked=False, width=40) if each.startswith("  ")]
    assert rows[0].split() == ["quantization", "weights", "fits"]
    assert max(map(len, rows)) <= 40


def test_the_most_precise_that_fits_is_taken_unless_another_is_much_faster(tmp_path: Path) -> None:
    model = shape(tmp_path, "7b")

    def said(gpu: Hardware) -> str:
        return advice(report(model, [gpu], EngineOptions()), context_asked=False)

    assert said(pretended_gpu(16 * GIB)).startswith("Take int8 on a GPU of 16.0 GiB: of all that fits it loses least,")
    assert said(pretended_gpu(24 * GIB)).startswith("Take none on a GPU of 24.0 GiB: it fits, loses least of all,")
    fast = said(pretended_gpu(24 * GIB, name="NVIDIA GeForce RTX 4090"))
    assert "none, which loses less, is 2.5 times slower by the floor. Start it with: batchmill worker -m" in fast
    assert said(pretended_gpu(4 * GIB)).startswith("Nothing fits: nf4 takes least, 6.0 GiB with a row of 4,096 tokens")


def test_gpus_of_which_the_same_is_to_be_said_are_shown_once(tmp_path: Path) -> None:
    model = shape(tmp_path, "7b")
    one, two = (Hardware(f"cuda:{index}", "a", True, 24 * GIB, 23 * GIB - index, None) for index in range(2))
    full = Hardware("cuda:2", "a", True, 24 * GIB, GIB, None)
    said = list(to_lines(report(model, [one, two, full], EngineOptions()), context_asked=False))
    assert [line.partition(" (a)")[0] for line in said if " (a)" in line] == ["cuda:0, cuda:1", "cuda:2"]


def plan(*arguments: str) -> str:
    found = CliRunner().invoke(cli_plan.main, arguments, catch_exceptions=False)
    assert found.exit_code == 0, found.output
    return found.stdout


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
    found = json.loads(plan(DEMO, "--gpu-memory", "24GiB", "--rows", "8", "--json"))
    assert (found["model"], found["rows"], found["row_tokens"]) == (DEMO, 8, 512)
    (device,) = found["devices"]
    assert (device["pretended"], device["total_bytes"], device["bytes_per_second"]) == (True, 24 * GIB, None)
    plain = device["quantizations"][0]
    assert (plain["quantization"], plain["rows"], plain["fits"]) == ("none", 8, True)
    assert (
        plain["total_bytes"] == plain["weights_bytes"] + plain["buffers_bytes"] + 8 * 512 * plain["cache_token_bytes"]
    )
    assert plain["recorded_tokens_per_second"] is None
    assert found["take"] == {"device": "a GPU of 24.0 GiB", "quantization": "none", "command": found["take"]["command"]}
    assert found["take"]["command"] == "batchmill worker -m demo -q none"


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
    found = CliRunner().invoke(cli_plan.main, arguments)
    assert (found.exit_code, "Traceback" in found.output) == (2, False)
    assert said in found.output


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
    found = CliRunner().invoke(cli_plan.main, [str(tmp_path / "model"), "--gpu-memory", "1GiB"])
    assert found.exit_code == 1
    assert said in found.output
    assert len(found.output.strip().splitlines()) == 1


def test_speeds_are_of_this_machine_and_count_overlapping_runs_once(sqlite_url: str, clock: mill.Clock) -> None:
    store = Store(sqlite_url, now=clock.expression())
    mill.load(store, count=8, batch_size=4)
    who = mill.session(store)
    claimed = mill.claim(store, who, wanted=8)
    clock.seconds += 10
    store.leases.sync(who, [mill.answered(each) for each in claimed])
    assert [each.tokens_per_second for each in store.speeds.of(mill.ECHO_SPEC, host="host")] == [8 * 3 / 10]
    with store.database.write() as connection:
        # The second begins when the first is half done, and takes five seconds longer.
        connection.execute(
            update(runs).where(runs.c.batch_id == 2).values(started_at=1_000_005.0, finished_at=1_000_015.0)
        )
    (found,) = store.speeds.of(mill.ECHO_SPEC, host="host")
    assert (found.runs, found.completion_tokens, found.seconds, found.device_name) == (2, 24, 15.0, "cpu")
    assert store.speeds.of(mill.ECHO_SPEC, host="another") == []
    assert store.speeds.of(ModelSpec(DEMO), host="host") == []
    store.close()


def test_what_was_recorded_stands_beside_the_floor(tmp_path: Path) -> None:
    recorded = [
        Speed(Quantization.parse("nf4"), "cpu", 3, 1000, 10.0),
        Speed(Quantization.parse("none"), "NVIDIA H200", 1, 7, 1.0),
    ]
    found = report(PlannedModel(ModelSpec(DEMO), DEMO_FOLDER), [this_cpu(measured=False)], EngineOptions(), recorded)
    said = [line for line in to_lines(found, context_asked=False) if line.split()[:1] in (["nf4"], ["none"])]
    assert [line.split()[-1] for line in said] == ["-", "100"]
    assert [line.split()[-2] for line in said] == ["-", "-"], "of a device whose rates are not known there is no floor"


@pytest.mark.parametrize(
    ("written", "count"), [("24GiB", 24 * GIB), ("1.5 gib", 3 * GIB // 2), ("900MB", 900 * 10**6), ("12B", 12)]
)
def test_sizes_are_read_with_their_unit(written: str, count: int) -> None:
    assert bytes_of(written) == count


@pytest.mark.parametrize("written", ["24", "GiB", "-1GiB", "0GiB", "24 parsecs", "1e9B", ""])
def test_a_size_without_a_unit_is_refused(written: str) -> None:
    with pytest.raises(UsageError, match="is no size of memory; write it with its unit"):
        bytes_of(written)


def test_a_size_that_is_shown_can_be_read() -> None:
    assert bytes_of(size(24 * GIB)) == 24 * GIB
