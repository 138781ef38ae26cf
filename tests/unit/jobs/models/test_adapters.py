"""Names of adapters, and the values that `--adapter` reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from batchmill.jobs.errors import UsageError
from batchmill.jobs.models.adapters import Adapter, check_all, check_name, from_json, to_json


@pytest.mark.parametrize(
    ("written", "adapter"),
    [
        ("sql=org/sql-lora", Adapter("sql", "org/sql-lora")),
        ("sql=org/sql-lora@v1.0", Adapter("sql", "org/sql-lora", "v1.0")),
        ("a.b_C-9=gpt", Adapter("a.b_C-9", "gpt")),
    ],
)
def test_an_adapter_of_the_hub_is_its_id_and_its_revision(written: str, adapter: Adapter) -> None:
    assert Adapter.parse(written) == adapter
    assert str(adapter) == written


@pytest.mark.parametrize("folder", ["lora", "lo@ra", "lo=ra", "with space"])
def test_a_folder_is_its_real_path_and_survives_its_spelling(tmp_path: Path, folder: str) -> None:
    (tmp_path / folder).mkdir()
    (tmp_path / "link").symlink_to(folder)
    for written in (f"x=./{folder}", f"x={tmp_path}/link", f"x={folder}"):
        parsed = Adapter.parse(written)
        assert parsed == Adapter("x", str(tmp_path / folder))
        assert Adapter.parse(str(parsed)) == parsed


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("sql", "NAME=PATH_OR_ID"),
        ("sql=", "NAME=PATH_OR_ID"),
        ("=org/x", "'' is no name"),
        ("a/b=org/x", "'a/b' is no name"),
        ("-a=org/x", "begins with a letter"),
        (f"{'a' * 65}=org/x", "1 to 64"),
        ("ä=org/x", "is no name"),
        ("demo=org/x", "the name of a model"),
        ("echo=org/x", "the name of a model"),
        ("sql=./nowhere", "there is no folder './nowhere' here"),
        ("sql=org/x@", "org/name@revision"),
        ("sql=.@main", "@main goes with a Hugging Face id"),
    ],
)
def test_what_is_no_adapter_is_refused_with_what_to_write(written: str, said: str) -> None:
    with pytest.raises(UsageError) as refused:
        Adapter.parse(written)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_name_has_64_characters_at_most() -> None:
    assert check_name("a" * 64) == "a" * 64


def test_each_adapter_is_there_once_and_a_name_means_one() -> None:
    one, other = Adapter("b", "org/x"), Adapter("a", "org/x")
    assert check_all([one, other, one]) == (other, one)
    with pytest.raises(UsageError, match="'b' is given twice: as org/x and org/y@v2"):
        check_all([one, Adapter("b", "org/y", "v2")])


def test_adapters_survive_their_json() -> None:
    adapters = (Adapter("a", "/p/ü"), Adapter("b", "org/y", "v2"))
    assert from_json(to_json(adapters)) == adapters
    assert from_json(None) == ()
