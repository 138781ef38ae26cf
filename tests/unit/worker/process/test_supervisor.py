"""The end of `batchmill up` and of the supervisor of its workers."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from batchmill.jobs.configuration.settings import Settings
from batchmill.jobs.errors import BatchmillError, StoreReplaced
from batchmill.jobs.models.spec import ModelSpec
from batchmill.migrations.revisions import open_store
from batchmill.producer.cli.local import up
from batchmill.worker.devices.placement import Placement
from batchmill.worker.process.supervisor import Supervisor


class Workers:
    """Workers that end by themselves with this exit code, or are ended by a signal that comes meanwhile."""

    exit_code: int | None = None

    def __init__(self, *_: object, **__: object) -> None:
        self.failed = True

    def ended(self, _seconds: float) -> bool:
        if self.exit_code is None:
            signal.raise_signal(signal.SIGTERM)
        return True

    def stop(self) -> None:
        pass


@contextmanager
def no_redis(_settings: Settings) -> Iterator[SimpleNamespace]:
    yield SimpleNamespace(tend=lambda: None)


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setattr(up, "LocalWorkers", Workers)
    monkeypatch.setattr(up, "own_redis", no_redis)
    return Settings(home=tmp_path)


def run(settings: Settings) -> None:
    up.run_mill(ModelSpec("echo"), devices=["cpu"], worker_words=[], settings=settings)


def test_a_mill_that_is_told_to_end_says_that_it_has(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    run(settings)
    assert capsys.readouterr().err.splitlines()[-2:] == [
        "stopping: finished outputs are saved, the rest returns to the queue",
        "the mill has ended",
    ]


def test_a_mill_whose_workers_end_fails(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Workers, "exit_code", 1)
    with pytest.raises(BatchmillError, match="the workers ended; see the lines above"):
        run(settings)
    monkeypatch.setattr(Workers, "stop", lambda _: settings.database_file.unlink())
    with pytest.raises(StoreReplaced, match="is gone; put its file back, or the next `up` begins a new one"):
        run(settings)


def test_no_worker_is_started_again_on_a_store_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(home=tmp_path)
    store = open_store(settings)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    supervisor = Supervisor([Placement.parse("cpu")], [], ends_when_idle=False, settings=settings, store=store)
    settings.database_file.unlink()
    try:
        with pytest.raises(StoreReplaced, match="is gone, and no worker is started on it again"):
            supervisor.run()
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGINT), before, strict=True):
            signal.signal(number, handler)
        store.close()
