"""The identity of a model's folder: the files that count, each hashed once in a home until it changes."""

from __future__ import annotations

import ast
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers.models
from huggingface_hub import resolve_revision
from structlog.testing import capture_logs

from batchmill.jobs import VERSION
from batchmill.jobs.errors import ModelError
from batchmill.jobs.models import digests
from batchmill.jobs.models.digests import Digests
from batchmill.jobs.models.identity import differences, of_adapter, of_echo, of_model
from tests.support.servers.hub_machine import Machine

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": "{}",
    "tokenizer.json": "{}",
    "tokenizer_config.json": "{}",
    "chat_template.jinja": "hello",
    "additional_chat_templates/tools.jinja": "tools",
    "generation_config.json": "{}",
    "model.safetensors": "w" * 1000,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are read, as they are; files count as settled at once."""
    names: list[str] = []
    read = digests._hash

    def hash_file(file: Path, stop: threading.Event) -> digests.Hashed:
        names.append(file.name)
        return read(file, stop)

    monkeypatch.setattr(digests, "_hash", hash_file)
    monkeypatch.setattr(digests, "_SETTLED_SECONDS", 0.0)
    return names


def read(folder: Path, home: Path | None = None) -> str:
    return of_model(folder, Digests(home)).identity


def _vocabulary_files() -> Iterator[str]:
    """The file names of transformers' tokenizers, read from their modules, some of which cannot be imported here."""
    (models,) = transformers.models.__path__
    for file in Path(models).glob("*/tokenization_*.py"):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "VOCAB_FILES_NAMES":
                yield from (each for each in ast.literal_eval(node.value).values() if isinstance(each, str))


class TestFiles:
    @pytest.mark.parametrize(
        ("name", "called"),
        [
            ("config.json", "configuration"),
            ("tokenizer.json", "tokenizer"),
            ("tokenizer_config.json", "tokenizer"),
            ("vocab.txt", "tokenizer"),
            ("chat_template.jinja", "chat template"),
            ("additional_chat_templates/tools.jinja", "chat template"),
            ("additional_chat_templates/more.jinja", "chat template"),
            ("generation_config.json", "generation_config.json"),
            ("model.safetensors", "weights"),
        ],
    )
    def test_what_is_loaded_counts(self, folder: Path, name: str, called: str) -> None:
        before = read(folder)
        (folder / name).write_text("another")
        assert differences(before, read(folder)) == called

    def test_a_file_that_is_gone_is_a_change(self, folder: Path) -> None:
        before = read(folder)
        for name in ("generation_config.json", "tokenizer_config.json", "model.safetensors"):
            (folder / name).unlink()
        assert differences(before, read(folder)) == "generation_config.json, tokenizer and weights"

    def test_what_is_not_loaded_does_not_count(self, folder: Path) -> None:
        before = read(folder)
        for name in (
            "README.md",
            "modeling.py",
            "tokenizer.py",
            "trainer_state.json",
            "pytorch_model.bin",
            ".gitattributes",
        ):
            (folder / name).write_text("x")
        (folder / "model-00001-of-00002.safetensors").write_text("left over")
        assert read(folder) == before

    def test_equal_content_is_equal_wherever_it_lies(self, folder: Path, tmp_path: Path) -> None:
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        for each in folder.iterdir():
            (elsewhere / each.name).symlink_to(each)
        assert read(elsewhere) == read(folder)

    def test_of_weights_in_several_files_each_that_the_index_names_counts(self, folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        mapping = {"a": "one.safetensors", "b": "two.safetensors", "c": "../three.safetensors"}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": mapping}))
        for name in (*mapping.values(), "four.safetensors"):
            (folder / name).write_text(name)
        before = read(folder)
        for name in ("../three.safetensors", "four.safetensors"):
            (folder / name).write_text("another")
        assert read(folder) == before
        (folder / "two.safetensors").write_text("another")
        assert differences(before, read(folder)) == "weights"

    @pytest.mark.parametrize("index", ["[", "[1]", "{}", '{"weight_map": {"a": 1, "b": null}}'])
    def test_an_index_that_says_nothing_is_no_error_here(self, folder: Path, index: str) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(index)
        assert "weights=" in read(folder)

    def test_every_file_of_transformers_tokenizers_counts(self, tmp_path: Path) -> None:
        names = set(_vocabulary_files())
        assert len(names) > 15
        for name in sorted(names):
            (tmp_path / name).write_text(name)
        counted = {name.name for name in of_model(tmp_path, Digests()).stamps}
        assert counted == names

    def test_of_an_adapter_its_configuration_and_weights_count(self, tmp_path: Path) -> None:
        for name in ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md"):
            (tmp_path / name).write_text("x")
        before = of_adapter(tmp_path, Digests())
        assert {each.name for each in before.stamps} == {"adapter_config.json", "adapter_model.safetensors"}
        assert before.changed() is None
        (tmp_path / "adapter_model.safetensors").write_text("y")
        assert before.changed() == "weights"

    def test_echo_is_batchmills_version(self) -> None:
        assert of_echo().identity == f"batchmill={VERSION}"
        assert differences("batchmill=0.1.0", "batchmill=0.2.0") == "version of batchmill"


class TestDigests:
    def test_a_file_is_hashed_once_in_a_home(self, folder: Path, tmp_path: Path, hashed: list[str]) -> None:
        first = read(folder, tmp_path)
        assert len(hashed) == len(FILES)
        assert read(folder, tmp_path) == first
        assert len(hashed) == len(FILES)
        read(folder, tmp_path / "another home")
        assert len(hashed) == 2 * len(FILES)

    def test_a_touched_file_is_hashed_again_and_is_the_same(
        self, folder: Path, tmp_path: Path, hashed: list[str]
    ) -> None:
        content = of_model(folder, Digests(tmp_path))
        hashed.clear()
        os.utime(folder / "model.safetensors")
        assert content.changed() is None
        assert hashed == ["model.safetensors"]

    def test_other_content_of_the_same_size_and_time_is_seen(
        self, folder: Path, tmp_path: Path, hashed: list[str]
    ) -> None:
        weights = folder / "model.safetensors"
        before, found = of_model(folder, Digests(tmp_path)), weights.stat()
        with weights.open("r+") as opened:
            opened.write("v")
        os.utime(weights, ns=(found.st_atime_ns, found.st_mtime_ns))
        assert weights.stat().st_mtime_ns == found.st_mtime_ns
        assert before.changed() == "weights"

    def test_what_was_written_just_now_is_not_remembered(
        self, folder: Path, tmp_path: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(digests, "_SETTLED_SECONDS", 3600.0)
        read(folder, tmp_path)
        read(folder, tmp_path)
        assert len(hashed) == 2 * len(FILES)

    @pytest.mark.parametrize("written", ["", "[]", "{", '{"format": 0, "files": {}}', '{"format": 1, "files": 3}'])
    def test_a_memory_that_cannot_be_read_counts_as_none(
        self, folder: Path, tmp_path: Path, hashed: list[str], written: str
    ) -> None:
        first = read(folder, tmp_path)
        (memory,) = (tmp_path / "digests").glob("*.json")
        memory.write_text(written)
        assert read(folder, tmp_path) == first
        assert len(hashed) == 2 * len(FILES)

    def test_a_memory_of_a_newer_batchmill_is_left_to_it(self, folder: Path, tmp_path: Path, hashed: list[str]) -> None:
        first = read(folder, tmp_path)
        (memory,) = (tmp_path / "digests").glob("*.json")
        newer = '{"format": 2, "files": {}}'
        memory.write_text(newer)
        with capture_logs() as said:
            assert read(folder, tmp_path) == first
        assert len(hashed) == 2 * len(FILES)
        assert memory.read_text() == newer
        assert "digests of a newer batchmill are left to it, and not used" in [each["event"] for each in said]

    def test_several_at_once_hash_once_and_tell_that_they_wait(
        self, folder: Path, tmp_path: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(digests, "_PROGRESS_SECONDS", 0.01)
        beats: list[int] = []
        begun, goes_on = threading.Event(), threading.Event()
        inner = digests._hash

        def slow(file: Path, stop: threading.Event) -> digests.Hashed:
            begun.set()
            goes_on.wait(20)
            return inner(file, stop)

        monkeypatch.setattr(digests, "_hash", slow)
        found: list[str] = []

        def one(number: int) -> None:
            found.append(of_model(folder, Digests(tmp_path, progress=lambda: beats.append(number))).identity)

        threads = [threading.Thread(target=one, args=(number,)) for number in range(3)]
        for each in threads:
            each.start()
        assert begun.wait(20)
        while set(beats) != {0, 1, 2}:
            assert any(each.is_alive() for each in threads)
        goes_on.set()
        for each in threads:
            each.join(20)
        assert len(set(found)) == 1
        assert len(found) == 3
        assert len(hashed) == len(FILES)

    def test_a_home_that_takes_no_files_keeps_nothing(self, folder: Path, tmp_path: Path, hashed: list[str]) -> None:
        (tmp_path / "digests").write_text("in the way")
        assert read(folder, tmp_path) == read(folder)
        assert len(hashed) == 2 * len(FILES)

    def test_a_file_that_cannot_be_read_is_one_line(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: object) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(digests, "_hash", refuse)
        with pytest.raises(ModelError, match=r"cannot read the files of .*Permission denied"):
            read(folder)


@pytest.mark.parametrize("revision", [None, "main", "v1", "refs/pr/1", COMMIT, "absent"])
@pytest.mark.parametrize("where", ["HF_HOME", "HF_HUB_CACHE"])
def test_a_commit_of_the_cache_is_found_as_huggingface_hub_finds_it(
    tmp_path: Path, revision: str | None, where: str
) -> None:
    cache = tmp_path / "hub"
    refs = cache / "models--org--name" / "refs"
    for number, name in enumerate(("main", "v1", "refs/pr/1")):
        (refs / name).parent.mkdir(parents=True, exist_ok=True)
        (refs / name).write_text(str(number) * 40)
    code = f"from batchmill.jobs.models.hub_cache import cached_commit; print(cached_commit('org/name', {revision!r}))"
    value = str(tmp_path if where == "HF_HOME" else cache)
    found = Machine(tmp_path, "http://127.0.0.1:1").run("-c", code, **{where: value}).stdout.strip()
    try:
        wanted = resolve_revision("org/name", revision=revision, cache_dir=cache, local_files_only=True).resolved
    except Exception:
        wanted = "None"
    assert found == wanted
