"""Files that a model reads while it works: found where there are any, and a write into one is seen."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from bitsandbytes.functional import has_avx512bf16

from batchmill.jobs.errors import ModelError
from batchmill.jobs.models.digests import Digests
from batchmill.jobs.models.identity import Content, of_commit, of_model
from batchmill.jobs.models.spec import ModelSpec
from batchmill.worker.models.load import load
from batchmill.worker.models.sources import Sources, read_on
from tests.support.models.tiny import save_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def content(tmp_path: Path) -> Content:
    """A folder with one file."""
    (tmp_path / "model.safetensors").write_text("weights")
    return of_model(tmp_path, Digests())


@pytest.mark.parametrize(
    # Weights beside the 4-bit ones are cast to bfloat16, so read whole, where the CPU computes in that.
    ("quantization", "reads_on"),
    [("none", True), ("nf4", not has_avx512bf16())],
)
def test_weights_that_lie_in_their_file_are_found(folder: Path, quantization: str, reads_on: bool) -> None:
    loaded = load(ModelSpec.parse(str(folder), quantization=quantization), "cpu")
    assert read_on([loaded.content], from_disk=False) == ((loaded.content,) if reads_on else ())


def test_weights_behind_a_link_are_found(folder: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / "commit"
    shutil.copytree(folder, snapshot)
    blobs = tmp_path / "models--org--name" / "blobs"
    blobs.mkdir()
    (snapshot / "model.safetensors").rename(blobs / "blob")
    (snapshot / "model.safetensors").symlink_to(blobs / "blob")
    loaded = load(ModelSpec.parse(str(snapshot), quantization="none"), "cpu")
    assert read_on([loaded.content], from_disk=False) == (loaded.content,)


def test_weights_on_disk_are_read_at_every_use(content: Content) -> None:
    assert read_on([content], from_disk=False) == ()
    assert read_on([content], from_disk=True) == (content,)


def test_a_write_into_the_file_ends_it_and_a_touch_does_not(content: Content) -> None:
    said: list[str] = []
    contents = [of_commit("a" * 40), content]
    sources = Sources(contents, at_work=contents, give_up=said.append)
    (weights,) = content.stamps
    weights.touch()
    assert sources.are_whole()
    weights.write_text("another")
    assert not sources.are_whole()
    assert said == ["the model's files were written while it worked (weights); start the worker again"]


def test_files_that_are_gone_end_it_too(content: Content) -> None:
    said: list[str] = []
    (weights,) = content.stamps
    weights.unlink()
    weights.parent.rmdir()
    assert not Sources([content], at_work=[content], give_up=said.append).are_whole()
    assert "weights" in said[0]


def test_a_file_written_is_seen_at_once_and_what_changed_is_told(content: Content) -> None:
    sources = Sources([of_commit("a" * 40), content], give_up=pytest.fail)
    assert sources.are_untouched()
    (weights,) = content.stamps
    weights.write_text("another")
    assert not sources.are_untouched()
    assert sources.changed() == "weights"
    assert not sources.are_untouched()


def test_a_file_that_was_only_touched_is_the_same_from_then_on(content: Content) -> None:
    sources = Sources([content], give_up=pytest.fail)
    (weights,) = content.stamps
    os.utime(weights, (1, 1))
    assert not sources.are_untouched()
    assert sources.changed() is None
    assert sources.are_untouched()


def test_files_that_cannot_be_read_are_looked_at_again_later(content: Content) -> None:
    def unreadable() -> Content:
        raise ModelError("cannot read the files: Stale file handle")

    sources = Sources([replace(content, again=unreadable)], give_up=pytest.fail)
    (weights,) = content.stamps
    weights.write_text("another")
    assert sources.changed() is None
    assert not sources.are_untouched()
