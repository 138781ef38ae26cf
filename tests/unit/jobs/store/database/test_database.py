"""The file of a SQLite store is made by an upgrade alone: whoever else opens it finds it there, or says so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from batchmill.jobs.configuration.settings import load_settings
from batchmill.jobs.errors import SchemaMismatch, StoreUnavailable
from batchmill.jobs.store.store import Store
from batchmill.migrations.revisions import upgrade

NAMES = ("plain", "a space", "50%20", "what?mode=memory", "hash#tag", "café ☕", "'quoted\"")


@pytest.mark.parametrize("name", NAMES)
def test_a_store_is_found_under_any_name_and_never_made_by_opening_it(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    settings = load_settings(home=folder)
    store = Store(settings.database)
    assert store.database.is_absent
    assert store.revision() is None
    with pytest.raises(SchemaMismatch, match="no tables yet"):
        store.check_revision()
    with pytest.raises(StoreUnavailable, match="unable to open"):
        store.jobs.jobs(most=1)
    assert list(folder.iterdir()) == []
    upgrade(settings.database)
    store.check_revision()
    assert settings.database_file.is_file()
    store.close()
    settings.database_file.unlink()
    with pytest.raises(StoreUnavailable):
        store.jobs.jobs(most=1)
    assert not settings.database_file.exists()


def test_the_first_commands_of_a_home_make_its_store_together(tmp_path: Path) -> None:
    environ = os.environ | {"BATCHMILL_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "batchmill", "jobs"]
    started = [subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    said = [each.communicate()[1] for each in started]
    assert [each.returncode for each in started] == [0] * 4, said
