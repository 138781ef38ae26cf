"""ModelSpec: one canonical spelling, folders and names that are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given

from batchmill.jobs.errors import UsageError
from batchmill.jobs.models.quantization import Kind, Quantization
from batchmill.jobs.models.spec import ModelSpec
from tests.support.model_specs import specs


@given(specs)
def test_a_spec_survives_its_canonical_spelling(spec: ModelSpec) -> None:
    assert ModelSpec.from_canonical(spec.canonical) == spec


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
