"""Digests of files that change or take long: the marks of a file, the progress that is told, and a file hashed anew."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from batchmill.jobs.models import digests
from batchmill.jobs.models.digests import Digests, Stamp

MARKS = {"st_size": 1, "st_mtime_ns": 2, "st_ctime_ns": 3, "st_ino": 4}


def stamp(**changes: int) -> Stamp:
    """The stamp of a file of these marks."""
    status: Any = SimpleNamespace(**MARKS | changes)
    return Stamp.of(status)


@pytest.mark.parametrize("name", MARKS)
def test_a_file_is_another_by_each_mark_alone(name: str) -> None:
    assert stamp() == stamp()
    assert stamp(**{name: 9}) != stamp()


def test_progress_is_told_while_a_file_is_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "weights").touch()
    told, read = threading.Event(), digests._hash

    def hash_when_told(file: Path, stop: threading.Event) -> digests.Hashed:
        assert told.wait(10)
        return read(file, stop)

    monkeypatch.setattr(digests, "_hash", hash_when_told)
    monkeypatch.setattr(digests, "_PROGRESS_SECONDS", 0.01)
    # Without a home there is no lock, which would tell of progress too.
    assert Digests(progress=told.set).of(tmp_path, ["weights"])["weights"].stamp.bytes == 0


class WritingMeanwhile(threading.Event):
    """The event of nobody who stops: it writes the file anew once its first block is read."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self._file = file
        self._asked = 0

    def is_set(self) -> bool:
        self._asked += 1
        if self._asked == 2:
            self._file.write_bytes(b"another content")
        return False


def test_a_file_that_is_written_while_it_is_hashed_is_hashed_again(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"content")
    hashed = digests._hash(file, WritingMeanwhile(file))
    assert hashed == (Stamp.of(file.stat()), hashlib.sha256(b"another content").hexdigest())
