"""ModelSpec: one canonical spelling, queue names that are safe, folders and names that are refused."""

from __future__ import annotations

import re
from pathlib import Path
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchmill.jobs.errors import UsageError
from batchmill.jobs.models.quantization import Kind, Quantization
from batchmill.jobs.models.spec import ModelSpec

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


def quantization_of(kind: Kind) -> st.SearchStrategy[Quantization]:
    written = {
        "compute_dtype": st.sampled_from(["bfloat16", "float16", "float32"]),
        "double_quant": st.sampled_from(["true", "false"]),
        "skip_modules": st.lists(st.sampled_from(["lm_head", "a.b", "layers.0"]), min_size=1).map("+".join),
        "threshold": st.floats(0, 1e6).map(str),
        "fp32_cpu_offload": st.sampled_from(["true", "false"]),
        "dtype": st.sampled_from(["bfloat16", "float16", "float32"]),
    }
    options = Quantization(kind).options
    pairs = st.fixed_dictionaries({}, optional={name: written[name] for name in options})
    text = pairs.flatmap(lambda each: st.permutations([f"{name}={value}" for name, value in each.items()]))
    return text.map(lambda each: Quantization.parse(f"{kind}:{','.join(each)}" if each else kind.value))


quantizations = st.sampled_from(Kind).flatmap(quantization_of)
specs = st.builds(ModelSpec, texts, st.none() | texts, quantizations)


@given(specs)
def test_a_spec_survives_its_canonical_spelling(spec: ModelSpec) -> None:
    assert ModelSpec.from_canonical(spec.canonical) == spec


@given(specs, specs)
def test_equal_specs_share_a_queue_and_different_ones_do_not(one: ModelSpec, other: ModelSpec) -> None:
    assert (one == other) == (one.queue("a") == other.queue("a"))
    assert one.queue("a") != other.queue("b")


@given(specs)
def test_queue_names_are_safe_in_redis(spec: ModelSpec) -> None:
    assert re.fullmatch(r"bm-[a-z0-9-]{1,24}-[0-9a-f]{12}", spec.queue(uuid4().hex))
    assert re.fullmatch(r"bm-[a-z0-9-]{1,24}-[0-9a-f]{12}", spec.old_queue)


def test_a_folder_is_known_by_its_real_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "link").symlink_to(folder)
    spec = ModelSpec.parse(str(tmp_path / "link"))
    assert spec == ModelSpec.parse(f"{folder}/../model/")
    assert spec == ModelSpec.parse("model")
    assert spec.folder == folder
    assert spec.quantization == Quantization(Kind.NF4)


@pytest.mark.parametrize("name", ["./none", "/no/such/folder", "~/none", "a/b/c", "", "a\nb", "-x", "org/"])
def test_a_folder_that_is_not_here_and_names_that_mean_nothing_are_refused(name: str) -> None:
    with pytest.raises(UsageError):
        ModelSpec.parse(name)


def test_a_remote_folder_is_taken_on_request() -> None:
    assert ModelSpec.parse("/no/such/folder", remote_path=True).model == "/no/such/folder"
    with pytest.raises(UsageError, match="absolute"):
        ModelSpec.parse("folder", remote_path=True)


def test_hub_ids_keep_their_revision_and_literal_names_have_none() -> None:
    spec = ModelSpec.parse("org/name", quantization="int8", revision="v1")
    assert (spec.revision, spec.quantization) == ("v1", Quantization(Kind.INT8))
    assert spec.command_line() == ["batchmill", "worker", "-m", "org/name", "-q", "int8", "--revision", "v1"]
    with pytest.raises(UsageError, match="--revision"):
        ModelSpec.parse("demo", revision="v1")
    with pytest.raises(UsageError, match="nf4, fp4, int8, none"):
        ModelSpec.parse("demo", quantization="nf5")
    assert ModelSpec.parse("echo").quantization == Quantization(Kind.NONE)
    with pytest.raises(UsageError, match="echo"):
        ModelSpec.parse("echo", quantization="nf4")
